"""The power chip of a Raspberry Pi 5."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from energy.errors import SensorError
from energy.sensors import raspberry_pi
from tests.energy import boards

if TYPE_CHECKING:
    from pathlib import Path

WATTS = sum(amperes * volts for amperes, volts, _, _ in boards.PMIC_RAILS.values())


def test_currents_meet_the_voltages_of_their_name(tmp_path: Path) -> None:
    """The total is the sum of volts times amperes, whatever numbers the lines carry; the 5 V input has no current."""
    (sensor,) = raspberry_pi.probe(boards.pi5(tmp_path), run=lambda _: boards.pmic_answer())
    assert sum(sensor.read()) == pytest.approx(WATTS)
    assert dict(zip([rail.name for rail in sensor.rails], sensor.read(), strict=True))["VDD_CORE"] == pytest.approx(
        3.56
    )
    assert {"EXT5V", "BATT"}.isdisjoint(rail.name for rail in sensor.rails)
    assert all(rail.in_total for rail in sensor.rails)
    assert sensor.source.scope == "module"
    assert "not USB devices, HATs, NVMe" in sensor.source.covers
    assert 0.5 <= sensor.interval_s <= 1.0


def test_a_real_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another runner the program vcgencmd on PATH answers."""
    program = boards.vcgencmd(tmp_path / "bin", {"pmic_read_adc": boards.pmic_answer()})
    monkeypatch.setenv("PATH", str(program.parent))
    (sensor,) = raspberry_pi.probe(boards.pi5(tmp_path / "root"))
    assert sum(sensor.read()) == pytest.approx(WATTS)


def test_names_of_other_firmwares(tmp_path: Path) -> None:
    """DDR rails and the 0.8 V rail have other names elsewhere, even within one answer."""
    rails = {"DDR_VDD2": (0.1, 1.1, 3, 11), "VDD_CORE": (2.0, 0.9, 7, 15), "0V8_SYS": (0.5, 0.8, 6, 14)}
    answer = boards.pmic_answer(rails).replace("0V8_SYS_V", " 0V8_SW_V")
    (sensor,) = raspberry_pi.probe(boards.pi5(tmp_path), run=lambda _: answer)
    assert sum(sensor.read()) == pytest.approx(0.11 + 1.8 + 0.4)


def test_a_current_without_voltage_is_named(tmp_path: Path) -> None:
    """What cannot be counted is said in what the sensor covers."""
    answer = boards.pmic_answer().replace("HDMI_V", "HDMIX_V")
    (sensor,) = raspberry_pi.probe(boards.pi5(tmp_path), run=lambda _: answer)
    assert "HDMI without a voltage" in sensor.source.covers
    assert sum(sensor.read()) == pytest.approx(WATTS - 0.03)


def test_a_pi_without_the_chip_and_other_boards_are_told_apart(tmp_path: Path) -> None:
    """A Pi 4 answers with an error and is pointed to other sensors; on another board nothing is run."""
    root = boards.pi5(tmp_path)
    boards.write(root / "proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4")
    with pytest.raises(SensorError, match=r"smart plug.*Raspberry Pi 4 Model B") as refused:
        raspberry_pi.probe(root, run=lambda _: 'error=1 error_msg="Command not registered"\n')
    assert refused.value.fault == "unsupported"
    with pytest.raises(SensorError) as absent:
        raspberry_pi.probe(tmp_path / "empty", run=None)
    assert absent.value.fault == "absent"


def test_a_missing_program_and_a_missing_right_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own fault and cure."""
    root = boards.pi5(tmp_path / "root")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(SensorError, match="apt-get install") as missing:
        raspberry_pi.probe(root)
    assert missing.value.fault == "unsupported"
    complaint = "Can't open device file: /dev/vcio\nTry creating a device file with: sudo mknod /dev/vcio c 100 0\n"
    boards.vcgencmd(tmp_path / "bin", {}, code=255, complaint=complaint)
    with pytest.raises(SensorError, match="group video") as forbidden:
        raspberry_pi.probe(root)
    assert forbidden.value.fault == "permission"
    boards.vcgencmd(tmp_path / "bin", {}, code=1, complaint="VCHI initialization failed\n")
    with pytest.raises(SensorError, match="VCHI initialization failed") as failed:
        raspberry_pi.probe(root)
    assert failed.value.fault == "unsupported"


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("current(7)=4.00000000A", "current(7)=-4.00000000A", "implausible"),
        ("current(7)=4.00000000A", "current(7)=nanA", "implausible"),
        ("current(7)=4.00000000A", "current(7)=4000.0A", "implausible"),
        ("current(7)=4.00000000A", "current(7)=4..0A", "implausible"),
        ("VDD_CORE_A", "VDD_KERN_A", "vanished"),
    ],
)
def test_absurd_answers_are_refused(tmp_path: Path, before: str, after: str, fault: str) -> None:
    """An answer that was good and turns bad is a fault of that reading."""
    answers = [boards.pmic_answer()]
    (sensor,) = raspberry_pi.probe(boards.pi5(tmp_path), run=lambda _: answers[-1])
    assert before in answers[0]
    answers.append(answers[0].replace(before, after))
    with pytest.raises(SensorError) as refused:
        sensor.read()
    assert refused.value.fault == fault


def test_only_zeros_are_no_measurement(tmp_path: Path) -> None:
    """A board that runs draws something."""
    rails = {name: (0.0, volts, at, of) for name, (_, volts, at, of) in boards.PMIC_RAILS.items()}
    with pytest.raises(SensorError, match="total reads 0 W") as refused:
        raspberry_pi.probe(boards.pi5(tmp_path), run=lambda _: boards.pmic_answer(rails))
    assert refused.value.fault == "implausible"
