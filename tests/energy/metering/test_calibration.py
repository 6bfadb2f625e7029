"""Fitting the modelled sensor to one that measures."""

from __future__ import annotations

import json
import resource
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from energy.errors import UsageError
from energy.metering.calibration import Calibration, Level, calibrate, fit, load_calibration, save_calibration
from energy.sensors.modelled import Modelled
from tests.energy.meter_tools import Counter

if TYPE_CHECKING:
    from pathlib import Path


def test_fit_finds_the_line() -> None:
    """Idle and busy watts of exact levels, and the residual of others."""
    exact = [Level(load, 3.0 + 4.0 * load) for load in (0.1, 0.5, 1.0)]
    assert fit(exact) == pytest.approx((3.0, 7.0, 0.0))
    noisy = [Level(0.0, 3.1), Level(0.0, 2.9), Level(1.0, 7.1), Level(1.0, 6.9)]
    assert fit(noisy) == pytest.approx((3.0, 7.0, 0.1))


@pytest.mark.parametrize("levels", [[Level(0.5, 3.0)] * 3, [Level(0.0, 5.0), Level(1.0, 4.0)]])
def test_fit_refuses_what_is_no_line(levels: list[Level]) -> None:
    """The same load all along, and power that falls under load, fit no model."""
    with pytest.raises(UsageError):
        fit(levels)


def test_real_load_against_a_sensor_that_follows_it(tmp_path: Path) -> None:
    """Levels of real load and a sensor with known watts give these watts, and the file keeps them."""
    this = psutil.Process()

    def busy_s() -> float:  # of the load alone, whatever else this machine does
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        running = [child.cpu_times() for child in this.children()]
        return ended.ru_utime + ended.ru_stime + sum(times.user + times.system for times in running)

    sensor = Counter(time.monotonic, 1.0, "wall")
    sensor.read = lambda: (3.0 * time.monotonic() + 2.0 * busy_s(),)
    found = calibrate([sensor], seconds=0.4, steps=2, cores=1, busy_s=busy_s)
    assert found.idle_watts == pytest.approx(3.0, abs=0.3)
    assert found.busy_watts == pytest.approx(5.0, abs=0.5)
    assert (found.sensor, len(found.levels)) == ("wall", 4)
    save_calibration(found, tmp_path / "modelled.json")
    assert load_calibration(tmp_path / "modelled.json") == found
    assert "joules" not in (tmp_path / "modelled.json").read_text()


def test_only_a_measuring_sensor_can_calibrate() -> None:
    """Neither nothing nor another model will do."""
    for way in ([], [Modelled(1.0, 2.0, lambda: 0.0)]):
        with pytest.raises(UsageError, match="needs a sensor that measures"):
            calibrate(way)


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    """A missing, foreign, newer or damaged file is named with the cure."""
    path = tmp_path / "modelled.json"
    good = Calibration(1.0, 2.0, 4, 0.1, "rapl", "package", "CPU")
    save_calibration(good, path)
    raw = json.loads(path.read_text())
    texts = ["[", "[" * 100_000, json.dumps(raw).replace('"cores": 4', '"cores": 1e999')]
    wrong = ({"format": "other"}, {"format_version": 2}, {"idle_watts": "x"}, {"busy_watts": 0.5})
    texts += [json.dumps(raw | change) for change in (*wrong, {"idle_watts": 10**400})]
    for text in texts:
        path.write_text(text)
        with pytest.raises(UsageError, match=r"modelled\.json"):
            load_calibration(path)
    with pytest.raises(UsageError, match="edge-energy calibrate"):
        load_calibration(tmp_path / "none.json")
