"""Which sensors a machine has, and in which order they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from energy.errors import UsageError
from energy.sensors import nvml, rapl
from energy.sensors.base import Rail, Source
from energy.sensors.discovery import MODULES, Found, choose, discover, ranked
from tests.energy import boards
from tests.energy.fake_nvml import FakeNvml


class Stub:
    """A sensor that is somebody else's: a plug, or the modelled one."""

    interval_s = 1.0

    def __init__(self, name: str, domain: Any, scope: Any, quality: Any) -> None:
        self.source = Source(name, scope, quality, name)
        self.domain = domain
        self.rails = (Rail(name, scope, "watts"),)

    def read(self) -> tuple[float, ...]:
        return (1.0,)

    def close(self) -> None:
        pass


def names(ways: Any) -> list[str]:
    return ["+".join(sensor.source.sensor for sensor in way) for way in ways]


@pytest.mark.parametrize(
    ("board", "sensors"),
    [
        (boards.orin_nano, ["jetson"]),
        (boards.agx_orin, ["jetson"]),
        (boards.xavier_nx, ["jetson"]),
        (boards.nano, ["jetson-legacy"]),
        (boards.tx2, ["jetson-legacy"]),
        (boards.thor, ["thor", "jetson"]),
        (boards.x86_intel, ["rapl-psys", "rapl"]),
        (boards.x86_amd, ["rapl"]),
    ],
)
def test_every_board_is_known_by_what_it_measures(tmp_path: Path, board: Any, sensors: list[str]) -> None:
    """The best way comes first; on Thor the board's input before the rails of its module."""
    found = discover(board(tmp_path))
    assert names(ranked(found.sensors)) == sensors
    assert {refusal.fault for refusal in found.refused} == {"absent"}


def test_a_bare_machine_has_no_sensor_and_says_why(tmp_path: Path) -> None:
    """Each sensor is refused with a reason in one line."""
    found = discover(tmp_path)
    assert found.sensors == ()
    assert [refusal.sensor.replace("-", "_") for refusal in found.refused] == list(MODULES)
    for refusal in found.refused:
        assert refusal.reason.startswith(refusal.sensor + ": ")
        assert "\n" not in refusal.reason


def test_this_machine_can_be_asked() -> None:
    """On whatever machine this runs, every sensor is found or refused, and what was found can be read."""
    found = discover()
    assert found.sensors or found.refused
    for sensor in found.sensors:
        assert len(sensor.read()) == len(sensor.rails)
        sensor.close()


def test_a_sensor_that_is_there_and_refused_keeps_its_fault(tmp_path: Path) -> None:
    """A charging laptop whose counters are forbidden: two clear reasons and no sensor."""
    boards.x86_intel(tmp_path)
    for path in tmp_path.glob("sys/devices/virtual/powercap/**/energy_uj"):
        path.chmod(0)
    boards.battery(tmp_path, {**boards.LAPTOP, "STATUS": "Charging"})
    with boards.unprivileged():
        found = discover(tmp_path)
    faults = {refusal.sensor: refusal.fault for refusal in found.refused if refusal.fault != "absent"}
    assert faults == {"rapl": "permission", "battery": "unsupported"}
    with pytest.raises(UsageError, match=r"sensor 'rapl' cannot be read on this machine.*CVE-2020-8694"):
        choose(found, "rapl")
    with pytest.raises(UsageError, match=r"sensor 'plug' needs its settings"):
        choose(found, "plug")


def test_ways_are_ranked_by_what_they_cover() -> None:
    """Measured before modelled; board, module, package; counters and power before coarse; of equals the first."""
    sensors = [
        Stub("model", "system", "modelled", "modelled"),
        Stub("packages", "cpu", "package", "counter"),
        Stub("board-coarse", "system", "board", "coarse"),
        Stub("module", "system", "module", "power"),
        Stub("card", "gpu", "package", "counter"),
        Stub("board", "system", "board", "counter"),
        Stub("board-2", "system", "board", "power"),
    ]
    assert names(ranked(sensors)) == [
        "board",
        "board-2",
        "board-coarse",
        "module",
        "packages+card",
        "packages",
        "model",
    ]
    assert ranked([]) == []


def test_processor_and_graphics_card_are_added(tmp_path: Path) -> None:
    """Both together are one way, and come before a platform counter that may leave the card out."""
    cpu, platform = rapl.probe(boards.x86_intel(tmp_path))
    (card,) = nvml.probe(library=FakeNvml({"energy_mj": 1}))
    assert names(ranked([platform, cpu, card])) == ["rapl+nvml", "rapl-psys", "rapl"]


def test_a_graphics_card_alone_is_used_only_if_it_is_named() -> None:
    """It does not know what training on the CPU draws, so no way at all is better than this one."""
    found = Found((Stub("nvml", "gpu", "package", "counter"), Stub("model", "system", "modelled", "modelled")), ())
    assert names(choose(found)) == ["model"]
    assert names(choose(found, "nvml")) == ["nvml"]


def test_a_driver_that_says_the_unthinkable_does_not_hide_the_other_sensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a search raises is a refusal of that sensor alone."""

    def probe(_: Path) -> None:
        raise OverflowError("int too large to convert to float")

    monkeypatch.setattr(nvml, "probe", probe)
    found = discover(boards.orin_nano(tmp_path))
    assert names(ranked(found.sensors)) == ["jetson"]
    refusal = next(refusal for refusal in found.refused if refusal.sensor == "nvml")
    assert (refusal.fault, "OverflowError" in refusal.reason) == ("implausible", True)


def test_a_user_may_choose(tmp_path: Path) -> None:
    """By name that one alone; none at all; anything else is refused with what there is."""
    found = discover(boards.thor(tmp_path))
    assert names(choose(found)) == ["thor", "jetson"]
    assert names(choose(found, "jetson")) == ["jetson"]
    assert choose(found, "none") == []
    with pytest.raises(UsageError, match=r"called 'wattmeter' .*one of: thor, jetson, .*; readable here: thor, jetson"):
        choose(found, "wattmeter")
    with pytest.raises(UsageError, match="'modeled'; did you mean 'modelled'"):
        choose(found, "modeled")
    with pytest.raises(UsageError, match="'modelled' needs watts: --model"):
        choose(found, "modelled")
    with pytest.raises(
        UsageError, match=r"'rapl' cannot be read on this machine \(readable here: thor, jetson\); rapl: no"
    ):
        choose(found, "rapl")
    legacy = Found((Stub("jetson-legacy", "system", "module", "power"),), ())
    assert names(choose(legacy, "jetson_legacy")) == ["jetson-legacy"]


def test_sensors_are_light() -> None:
    """Finding sensors and reading conditions loads nothing that the idle agent must do without."""
    code = (
        "import sys; from energy.metering.conditions import read_conditions; "
        "from energy.sensors.discovery import discover; "
        "discover(); print(*sys.modules)"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert not {"numpy", "asyncio", "dataclasses", "inspect", "msgspec", "subprocess", "pynvml"} & set(
        done.stdout.split()
    )
