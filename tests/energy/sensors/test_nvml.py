"""NVIDIA graphics cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from energy.errors import SensorError
from energy.sensors import nvml
from tests.energy.boards import write
from tests.energy.fake_nvml import FakeNvml

if TYPE_CHECKING:
    from pathlib import Path


def test_cards_with_a_counter_count_joules() -> None:
    """Several cards are one sensor with a rail each, all in the total."""
    cards = {"energy_mj": 5_000, "name": b"NVIDIA A"}, {"energy_mj": 7_500, "name": "NVIDIA B"}
    (sensor,) = nvml.probe(library=FakeNvml(*cards))
    assert sensor.read() == (5.0, 7.5)
    assert [(rail.name, rail.unit, rail.in_total) for rail in sensor.rails] == [
        ("gpu0", "joules", True),
        ("gpu1", "joules", True),
    ]
    assert (sensor.domain, sensor.source.quality) == ("gpu", "counter")
    assert "NVIDIA A, NVIDIA B" in sensor.source.covers


def test_older_cards_tell_their_power() -> None:
    """A card without a counter is read in watts, beside one that counts."""
    (sensor,) = nvml.probe(library=FakeNvml({"energy_mj": 5_000}, {"power_mw": 30_250}))
    assert sensor.read() == (5.0, 30.25)
    assert [rail.unit for rail in sensor.rails] == ["joules", "watts"]
    assert sensor.source.quality == "power"


def test_a_jetson_answers_not_supported() -> None:
    """The library starts and finds a GPU, and yet nothing is measured."""
    with pytest.raises(SensorError, match="Orin") as refused:
        nvml.probe(library=FakeNvml({"name": "Orin (nvgpu)"}))
    assert refused.value.fault == "unsupported"


def test_a_card_that_tells_nothing_is_named_beside_one_that_does() -> None:
    """What is not in the figure is said."""
    (sensor,) = nvml.probe(library=FakeNvml({"energy_mj": 1, "name": "A"}, {"name": "B"}))
    assert "not B" in sensor.source.covers
    assert len(sensor.rails) == 1


@pytest.mark.parametrize(("code", "fault"), [(4, "permission"), (15, "vanished"), (999, "vanished")])
def test_a_card_that_is_lost(code: int, fault: str) -> None:
    """A card that falls off the bus, or is taken from this user, is that fault of the reading."""
    card: dict[str, object] = {"energy_mj": 1}
    (sensor,) = nvml.probe(library=FakeNvml(card))
    card["error"] = code
    with pytest.raises(SensorError) as lost:
        sensor.read()
    assert lost.value.fault == fault


def test_a_counter_that_falls_and_power_that_cannot_be() -> None:
    """A driver that was loaded again starts at 0: that reading is refused, the next one is good."""
    counting: dict[str, object] = {"energy_mj": 9000}
    (sensor,) = nvml.probe(library=FakeNvml(counting))
    counting["energy_mj"] = 100
    with pytest.raises(SensorError, match="fell from 9 J") as refused:
        sensor.read()
    assert refused.value.fault == "implausible"
    assert sensor.read() == (0.1,)
    with pytest.raises(SensorError) as absurd:
        nvml.probe(library=FakeNvml({"power_mw": 4_294_967_295}))
    assert absurd.value.fault == "implausible"


def test_without_driver_and_without_library(tmp_path: Path) -> None:
    """No driver: absent. A driver and no pynvml, or a library that does not start: unsupported, with the cure."""
    with pytest.raises(SensorError) as absent:
        nvml.probe(tmp_path)
    assert absent.value.fault == "absent"
    with pytest.raises(SensorError) as dead:
        nvml.probe(library=FakeNvml(start_error=9))
    assert dead.value.fault == "unsupported"
    with pytest.raises(SensorError, match="no card"):
        nvml.probe(library=FakeNvml())


def test_a_driver_without_pynvml_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    write(tmp_path / "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX")
    with pytest.raises(SensorError, match=r"edge-training-runtime\[nvml\]") as refused:
        nvml.probe(tmp_path)
    assert refused.value.fault == "unsupported"
