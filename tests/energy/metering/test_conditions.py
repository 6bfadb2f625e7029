"""Temperature, throttling, clocks and power mode of real boards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edge_runtime import telemetry
from energy.metering.conditions import Conditions, read_conditions
from tests.energy import boards
from tests.energy.fake_nvml import FakeNvml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def test_a_jetson_at_ease(tmp_path: Path) -> None:
    """Hottest zone, no cause, its counters, clocks of cores and GPU (no other engine), and the name of its mode."""
    assert read_conditions(boards.orin_nano(tmp_path)) == Conditions(
        temperature_c=51.0,
        throttled=(),
        events={"oc1_event_cnt": 0, "oc2_event_cnt": 0, "oc3_event_cnt": 0},
        clocks_hz={"policy0": 1_344_000_000, "policy4": 1_344_000_000, "gpu": 305_898_438},
        power_mode="15W",
    )


def test_a_jetson_that_throttles(tmp_path: Path) -> None:
    """A cooling device at work is a cause, over-current is a counter, and a fan that turns is neither."""
    root = boards.orin_nano(tmp_path)
    boards.write(root / "sys/class/thermal/cooling_device1/cur_state", 3)
    boards.write(root / "sys/class/hwmon/hwmon9/oc3_event_cnt", 2)
    now = read_conditions(root)
    assert now.throttled == ("cpufreq-cpu0 slowed down (step 3)",)
    assert now.events["oc3_event_cnt"] == 2


def test_zones_that_lie_or_refuse_are_left_out(tmp_path: Path) -> None:
    """The constant 100 degrees of the PMIC, absurd values, no number, and zones that cannot be read now."""
    zones = [("PMIC-Die", 100000), ("cpu", 41500), ("gpu", 1_000_000), ("cv0", -274000), ("tj", 0), ("ao", 39000)]
    boards.thermal(tmp_path, zones)
    boards.write(tmp_path / "sys/class/thermal/thermal_zone4/temp", "busy")
    broken = tmp_path / "sys/class/thermal/thermal_zone5/temp"
    broken.unlink()
    broken.mkdir()
    assert read_conditions(tmp_path).temperature_c == 41.5
    assert telemetry.temperature_c(tmp_path) == 41.5  # an agent's limit goes by the same rule


def test_without_zones_chips_tell_the_temperature(tmp_path: Path) -> None:
    """The processor's first, another one's if there is none, and a PMIC's constant never."""
    assert telemetry.temperature_c(tmp_path) is None
    for number, (name, value) in enumerate([("PMIC_Die", 100_000), ("nvme", 60_000), ("k10temp", 45_000)]):
        boards.write(tmp_path / f"sys/class/hwmon/hwmon{number}/name", name)
        boards.write(tmp_path / f"sys/class/hwmon/hwmon{number}/temp1_input", value)
    assert telemetry.temperature_c(tmp_path) == 45.0
    boards.write(tmp_path / "sys/class/hwmon/hwmon2/temp1_input", "9" * 400)
    assert telemetry.temperature_c(tmp_path) == 60.0


@pytest.mark.parametrize(
    ("answer", "causes", "events"),
    [
        ("throttled=0x0\n", (), {"under_voltage": 0, "clock_capped": 0, "throttled": 0, "soft_temperature_limit": 0}),
        (
            "throttled=0x50000\n",
            (),
            {"under_voltage": 1, "clock_capped": 0, "throttled": 1, "soft_temperature_limit": 0},
        ),
        (
            "throttled=0x50005\n",
            ("under-voltage", "throttled"),
            {"under_voltage": 1, "clock_capped": 0, "throttled": 1, "soft_temperature_limit": 0},
        ),
        (
            "throttled=0xe000a\n",
            ("clock capped", "soft temperature limit"),
            {"under_voltage": 0, "clock_capped": 1, "throttled": 1, "soft_temperature_limit": 1},
        ),
    ],
)
def test_a_raspberry_pi_tells_what_happens_and_what_happened(
    tmp_path: Path, answer: str, causes: tuple[str, ...], events: dict[str, int]
) -> None:
    """Bits 0 to 3 are causes now, bits 16 to 19 are events since boot."""
    asked = []

    def run(arguments: Sequence[str]) -> str:
        asked.append(tuple(arguments))
        return answer

    now = read_conditions(boards.pi5(tmp_path), run=run)
    assert now.throttled == causes
    assert now.events == {f"pi_{name}": value for name, value in events.items()}
    assert now.power_mode == "ondemand"
    assert asked == [("vcgencmd", "get_throttled")]


def test_a_raspberry_pi_without_vcgencmd(tmp_path: Path) -> None:
    """The kernel's alarm of under-voltage is enough to tell; a program that is missing or fails is no error."""

    def run(_: Sequence[str]) -> str:
        raise FileNotFoundError

    root = boards.pi5(tmp_path)
    assert read_conditions(root, run=run).throttled == ()
    boards.write(root / "sys/class/hwmon/hwmon2/in0_lcrit_alarm", 1)
    assert read_conditions(root, run=run).throttled == ("under-voltage",)
    both = read_conditions(root, run=lambda _: "throttled=0x1\n")
    assert both.throttled == ("under-voltage",)
    assert read_conditions(root, run=lambda _: "nonsense").events == {}


def test_intel(tmp_path: Path) -> None:
    """Overheating of the package is one counter; a fixed offset and an idle injector are no throttling."""
    now = read_conditions(boards.x86_intel(tmp_path))
    assert now == Conditions(61.0, (), {"package_throttle_count": 3}, {}, None)
    boards.write(tmp_path / "sys/class/thermal/cooling_device0/cur_state", 1)
    assert read_conditions(tmp_path).throttled == ("Processor slowed down (step 1)",)


def test_amd_has_its_temperature_in_hwmon(tmp_path: Path) -> None:
    """Where there is no thermal zone the processor's chip is asked; it cannot tell of throttling."""
    assert read_conditions(boards.x86_amd(tmp_path)) == Conditions(45.25, None, {}, {}, None)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    """Unknown is None and never 0."""
    assert read_conditions(tmp_path) == Conditions(None, None, {}, {}, None)


def test_the_power_mode_is_asked_where_files_do_not_name_it(tmp_path: Path) -> None:
    """A mode that the table lacks comes from nvpmodel, and from the governor where that fails too."""
    root = boards.orin_nano(tmp_path)
    boards.write(root / "var/lib/nvpmodel/status", "pmode:0002 fmode:quiet")
    asked = {("nvpmodel", "-q"): "NV Fan Mode:quiet\nNV Power Mode: MAXN_SUPER\n2\n"}
    assert read_conditions(root, run=lambda arguments: asked[tuple(arguments)]).power_mode == "MAXN_SUPER"
    assert read_conditions(root).power_mode == "schedutil"
    boards.write(root / "var/lib/nvpmodel/status", "pmode:0001")
    assert read_conditions(root).power_mode == "7W"


def test_graphics_cards_tell_why_they_are_slow(tmp_path: Path) -> None:
    """Power limit and heat are causes; an idle card and requested clocks are none."""
    library = FakeNvml(
        {"reasons": 0x04 | 0x20, "clock_mhz": 1200}, {"reasons": 0x01 | 0x02, "clock_mhz": 210}, {"name": "silent"}
    )
    now = read_conditions(tmp_path, library=library)
    assert now.throttled == ("gpu0: power limit", "gpu0: too hot (driver)")
    assert now.clocks_hz == {"gpu0": 1_200_000_000, "gpu1": 210_000_000}
    assert read_conditions(tmp_path, library=FakeNvml({"name": "Orin (nvgpu)"})).throttled is None


def test_a_real_program_is_run_on_the_machine_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default runner starts vcgencmd, once, and only for a root that is this machine's own."""
    from energy.sensors._files import run_command

    boards.vcgencmd(tmp_path / "bin", {"get_throttled": "throttled=0x4\n"})
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    root = boards.pi5(tmp_path / "root")
    assert read_conditions(root).throttled == ()
    assert read_conditions(root, run=run_command).throttled == ("throttled",)
