"""Jetson power monitors: hwmon of JetPack 5 and later, iio of JetPack 4, and Thor's INA238."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from energy.errors import SensorError
from energy.sensors import jetson, jetson_legacy, thor
from tests.energy import boards


def total(sensor) -> float:
    return sum(value for value, rail in zip(sensor.read(), sensor.rails, strict=True) if rail.in_total)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def in_total(sensor) -> list[str]:
    return [rail.name for rail in sensor.rails if rail.in_total]


def test_orin_nano_is_measured_at_its_input(tmp_path: Path) -> None:
    """The total is VDD_IN in watts; its children are shown and not added to it."""
    (sensor,) = jetson.probe(boards.orin_nano(tmp_path))
    assert total(sensor) == pytest.approx(4.984 * 1.856)
    assert in_total(sensor) == ["VDD_IN"]
    assert [rail.name for rail in sensor.rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert sensor.source[:3] == ("jetson", "module", "power")
    assert "not the carrier board" in sensor.source.covers
    assert sensor.domain == "system"


def test_a_value_that_changes_is_read_anew(tmp_path: Path) -> None:
    """Files stay open, and every read gives what they hold now."""
    root = boards.orin_nano(tmp_path)
    (sensor,) = jetson.probe(root)
    boards.write(root / "sys/class/hwmon/hwmon1/curr1_input", 3000)
    assert total(sensor) == pytest.approx(4.984 * 3.0)


@pytest.mark.parametrize(
    ("board", "rails", "watts"),
    [
        (
            boards.agx_orin,
            ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"],
            8.43 * 0.617 + 7.8 * 0.343 + 4.968 * 0.953 + 4.8 * 0.341,
        ),
        (
            boards.agx_xavier,
            ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"],
            19.128 * 0.08 + 19.128 * 0.16 + 19.112 * 0.12 + 19.128 * 0.04 + 5.008 * 0.4,
        ),
    ],
)
def test_agx_boards_without_a_total_sum_the_rails_of_both_chips(tmp_path: Path, board, rails, watts) -> None:
    """Every rail that is connected counts, and the source says that the carrier board is missing."""
    (sensor,) = jetson.probe(board(tmp_path))
    assert in_total(sensor) == rails
    assert total(sensor) == pytest.approx(watts)
    assert sensor.source.scope == "module"
    assert "module only" in sensor.source.covers
    assert {rail.scope for rail in sensor.rails} == {"rail"}


@pytest.mark.parametrize("label", ["NC", "", "nc"])
def test_channels_that_are_not_connected_are_left_out(tmp_path: Path, label: str) -> None:
    """NC, no label, switched off, the sum of the shunts and the summed current: none of them is a rail."""
    chip = boards.ina3221(tmp_path, "1-0040", 7, [("CPU", 5000, 1000), (label, 5000, 500), ("OFF", 5000, 500)])
    boards.write(chip / "in3_enable", 0)
    (sensor,) = jetson.probe(tmp_path)
    assert [rail.name for rail in sensor.rails] == ["CPU"]


def test_chips_are_found_without_their_driver_folder(tmp_path: Path) -> None:
    """Where only the bus, or only the class, lists a chip, it is found by its name."""
    boards.ina3221(tmp_path, "7-0040", 12, [("VDD_IN", 5080, 768), None, None], driver=False)
    boards.write(tmp_path / "sys/class/hwmon/hwmon0/name", "nvme")
    (sensor,) = jetson.probe(tmp_path)
    assert total(sensor) == pytest.approx(5.08 * 0.768)
    (tmp_path / "sys/bus/i2c/devices/7-0040").unlink()
    (sensor,) = jetson.probe(tmp_path)
    assert total(sensor) == pytest.approx(5.08 * 0.768)


def test_equal_labels_of_two_chips_are_both_there(tmp_path: Path) -> None:
    """No rail is lost because another one has its name."""
    boards.ina3221(tmp_path, "1-0040", 1, [("CPU", 5000, 1000), None, None])
    boards.ina3221(tmp_path, "1-0041", 2, [("CPU", 5000, 2000), None, None])
    (sensor,) = jetson.probe(tmp_path)
    assert [rail.name for rail in sensor.rails] == ["CPU", "CPU #2"]
    assert total(sensor) == pytest.approx(15.0)


def test_nano_of_jetpack_4(tmp_path: Path) -> None:
    """The iio tree gives milliwatts; POM_5V_IN is the total and an unused GPU rail reads 0."""
    root = boards.nano(tmp_path)
    (sensor,) = jetson_legacy.probe(root)
    assert in_total(sensor) == ["POM_5V_IN"]
    assert sensor.read() == pytest.approx((1.628, 0.0, 0.407))
    assert sensor.source.sensor == "jetson-legacy"
    with pytest.raises(SensorError) as refused:
        jetson.probe(root)
    assert refused.value.fault == "absent"


def test_tx2_has_its_total_on_the_second_chip(tmp_path: Path) -> None:
    """VDD_IN of 0-0041 is the total of the rails of both chips; without in_power the product is taken."""
    root = boards.tx2(tmp_path)
    for path in root.glob("sys/devices/**/in_power*_input"):
        path.unlink()
    (sensor,) = jetson_legacy.probe(root)
    assert len(sensor.rails) == 6
    assert in_total(sensor) == ["VDD_IN"]
    assert total(sensor) == pytest.approx(19.128 * 0.16)


@pytest.mark.parametrize("register", [True, False])
def test_thor_is_measured_at_the_input_of_its_board(tmp_path: Path, register: bool) -> None:
    """VIN counts, from the chip's microwatts or from volts and amperes; rails of the module are shown beside it."""
    root = boards.thor(tmp_path)
    if not register:
        (root / "sys/class/hwmon/hwmon2/power1_input").unlink()
    (sensor,) = thor.probe(root)
    assert in_total(sensor) == ["VIN"]
    assert total(sensor) == pytest.approx(41.5, rel=1e-3)
    assert [rail.name for rail in sensor.rails] == ["VIN", "VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"]
    assert sensor.source.scope == "board"


def test_thor_without_labels_is_known_by_its_device_tree(tmp_path: Path) -> None:
    """Its only INA238 is the input's; on another board an INA238 may measure anything, and is no sensor."""
    root = boards.thor(tmp_path)
    (root / "sys/class/hwmon/hwmon2/in1_label").unlink()
    (sensor,) = thor.probe(root)
    assert total(sensor) == pytest.approx(41.5)
    boards.write(root / "proc/device-tree/model", "NVIDIA Jetson Orin NX")
    with pytest.raises(SensorError) as refused:
        thor.probe(root)
    assert refused.value.fault == "absent"


def test_a_chip_that_is_taken_away_has_vanished(tmp_path: Path) -> None:
    """A read after that says so; when the driver is back, reading goes on with the same sensor."""
    root = boards.orin_nano(tmp_path)
    (sensor,) = jetson.probe(root)
    boards.vanish(root / "sys/class/hwmon/hwmon1")
    with pytest.raises(SensorError, match="No such file") as gone:
        sensor.read()
    assert gone.value.fault == "vanished"
    chip = root / boards.SHARED_BUS / "1-0040/hwmon/hwmon1"
    for kind, values in {"in": (5000, 5000, 5000), "curr": (1000, 100, 100)}.items():
        for number, value in enumerate(values, start=1):
            boards.write(chip / f"{kind}{number}_input", value)
    assert total(sensor) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("milliamperes", "words"),
    [("-500", "-2.492 W"), ("0", "reads 0 W"), ("99999999", "outside 0-200 W"), ("nan", "whole number"), ("", "holds")],
)
def test_absurd_totals_are_refused(tmp_path: Path, milliamperes: str, words: str) -> None:
    """Negative, nothing at all, more than any Jetson, no number: a fault each, at the first read and at later ones."""
    root = boards.orin_nano(tmp_path)
    (sensor,) = jetson.probe(root)
    boards.write(root / "sys/class/hwmon/hwmon1/curr1_input", milliamperes)
    with pytest.raises(SensorError, match=words) as refused:
        sensor.read()
    assert refused.value.fault == "implausible"
    with pytest.raises(SensorError):
        jetson.probe(root)


def test_an_idle_rail_may_read_a_little_below_zero(tmp_path: Path) -> None:
    """The chip's offset is no fault of the rail: nothing flows there."""
    root = boards.orin_nano(tmp_path)
    boards.write(root / "sys/class/hwmon/hwmon1/curr2_input", -16)
    (sensor,) = jetson.probe(root)
    assert sensor.read()[1] == 0.0


def test_what_may_not_be_read_is_a_matter_of_permission(tmp_path: Path) -> None:
    """The fault is named at the probe, and also when the right is lost after the file had to be opened again."""
    root = boards.orin_nano(tmp_path)
    current = root / "sys/class/hwmon/hwmon1/curr1_input"
    (sensor,) = jetson.probe(root)
    current.chmod(0)
    with boards.unprivileged():
        with pytest.raises(SensorError) as refused:
            jetson.probe(root)
        assert refused.value.fault == "permission"
        assert total(sensor) == pytest.approx(4.984 * 1.856)  # opened before
        sensor.close()
        with pytest.raises(SensorError) as lost:
            sensor.read()
        assert lost.value.fault == "permission"


def test_more_than_a_module_can_draw_is_implausible(tmp_path: Path) -> None:
    """200 W for a module; a whole Thor with all that hangs on its carrier board may draw 400."""
    (orin,) = jetson.probe(boards.orin_nano(tmp_path / "orin"))
    (board,) = thor.probe(boards.thor(tmp_path / "thor"))
    assert orin.rails[0].limit_watts == 200.0
    assert board.rails[0].limit_watts == 400.0
    path = next((tmp_path / "thor").glob("sys/class/hwmon/*/power1_input"))
    boards.write(path, 300_000_000)
    assert board.read()[0] == pytest.approx(300.0)
    boards.write(path, 450_000_000)
    with pytest.raises(SensorError) as refused:
        board.read()
    assert refused.value.fault == "implausible"


def test_nothing_stays_open(tmp_path: Path) -> None:
    """A closed sensor, and a probe that failed, hold no files."""
    root = boards.agx_orin(tmp_path)
    gc.collect()
    before = open_files()
    (sensor,) = jetson.probe(root)
    assert open_files() == before + 8
    sensor.close()
    assert open_files() == before
    boards.write(root / "sys/class/hwmon/hwmon4/curr2_input", "?")
    with pytest.raises(SensorError):
        jetson.probe(root)
    assert open_files() == before
