"""Fits the modelled sensor, idle power plus a share per busy core, to a sensor that measures.

Levels of load (no core busy to all of them) are held by child processes, up and down again so that warming up cancels;
mean power is fitted to the share of busy core time by least squares.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import UsageError
from energy.metering.meter import Meter
from energy.metering.sampler import Sampler
from energy.sensors.modelled import machine_busy_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from energy.sensors.base import Sensor

FORMAT = "edge-energy-model"
FORMAT_VERSION = 1
SETTLE_SHARE = 0.25  # of a level's seconds pass before it counts: clocks and filters of sensors settle

# Ends by itself if its parent is gone and cannot stop it.
_LOAD = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: sum(range(20000))"


class Level(NamedTuple):
    """Mean power at one load; ``utilisation`` is the share of all core time that was busy."""

    utilisation: float
    watts: float


class Calibration(NamedTuple):
    """A fitted model, and what it was fitted to.

    ``residual_watts`` is the root mean square distance of the levels from the line. ``sensor``, ``scope`` and
    ``covers`` are those of the measuring sensor: the model knows no more of the machine than that one did.
    """

    idle_watts: float
    busy_watts: float
    cores: int
    residual_watts: float
    sensor: str
    scope: str
    covers: str
    levels: tuple[Level, ...] = ()
    created_unix_s: float = 0.0


def fit(levels: Sequence[Level]) -> tuple[float, float, float]:
    """Idle watts, busy watts and residual of the least-squares line through levels of load.

    Raises:
        UsageError: no two loads, or power that does not grow with load.
    """
    count = len(levels)
    mean_load = sum(level.utilisation for level in levels) / max(count, 1)
    mean_watts = sum(level.watts for level in levels) / max(count, 1)
    spread = sum((level.utilisation - mean_load) ** 2 for level in levels)
    if spread < 1e-3:
        raise UsageError("the load did not change enough to fit a model; stop other work on this machine and try again")
    slope = sum((level.utilisation - mean_load) * (level.watts - mean_watts) for level in levels) / spread
    idle = mean_watts - slope * mean_load
    residual = (sum((level.watts - idle - slope * level.utilisation) ** 2 for level in levels) / count) ** 0.5
    if slope <= 0:
        raise UsageError("power does not grow with load; check that the sensor measures this machine")
    return max(idle, 0.0), max(idle, 0.0) + slope, residual


def calibrate(
    way: Sequence[Sensor],
    *,
    seconds: float = 10.0,
    steps: int = 4,
    cores: int | None = None,
    busy_s: Callable[[], float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measures levels of load with the sensors of ``way`` and fits the model. Takes 2 x ``steps`` x ``seconds``.

    Args:
        way: sensors whose totals add up; they stay open.
        seconds: at every level.
        steps: levels from idle to all cores, fewer where there are fewer cores.
        cores: to load; None: all of this machine.
        busy_s: cumulative busy core seconds; None: from ``/proc/stat``.
        say: told the progress in words.

    Raises:
        UsageError: the sensor is none that measures, fails meanwhile, or sees nothing of the load.
    """
    cores = cores or os.cpu_count() or 1
    busy_s = busy_s or machine_busy_s()
    if not way or any(sensor.source.modelled for sensor in way):
        raise UsageError(
            "calibrating needs a sensor that measures; see edge-energy sensors for what there is, and why not"
        )
    meter = Meter([way])
    upwards = sorted({round(cores * step / max(steps - 1, 1)) for step in range(steps)})
    levels = []
    with Sampler(meter):
        for busy in (*upwards, *reversed(upwards)):
            level = _level(meter, busy, cores, seconds, busy_s)
            say(f"{busy} of {cores} cores loaded, {level.utilisation:.0%} busy: {level.watts:.2f} W")
            levels.append(level)
        source = meter.source
    if source is None:
        raise UsageError("the sensor failed meanwhile; try again, or with another --sensor")
    idle, busy_watts, residual = fit(levels)
    return Calibration(
        idle, busy_watts, cores, residual, source.sensor, source.scope, source.covers, tuple(levels), time.time()
    )


def _level(meter: Meter, busy: int, cores: int, seconds: float, busy_s: Callable[[], float]) -> Level:
    command = [sys.executable, "-c", _LOAD, str(2 * seconds + 5)]
    loads = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(busy)]
    try:
        time.sleep(SETTLE_SHARE * seconds)
        with meter.open(f"{busy} cores") as window:
            before_s = busy_s()
            time.sleep((1 - SETTLE_SHARE) * seconds)
            used_s = busy_s() - before_s
    finally:
        for load in loads:
            load.kill()
            load.wait()
    measurement = window.close()
    if measurement.joules is None:
        reasons = "; ".join(measurement.problems) or "no reading"
        raise UsageError(f"the sensor gave no joules ({reasons}); try again, or with another --sensor")
    return Level(used_s / (measurement.seconds * cores), measurement.joules / measurement.seconds)


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes it as JSON; the file is whole or not there.

    Raises:
        UsageError: it cannot be written.
    """
    fields = calibration._asdict() | {"levels": [level._asdict() for level in calibration.levels]}
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **fields}, indent=1)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def load_calibration(path: Path) -> Calibration:
    """Reads what :func:`save_calibration` wrote.

    Raises:
        UsageError: unreadable, of another format, or with a value that cannot be.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); make it with edge-energy calibrate") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(f"{path}: is no calibration; make one with edge-energy calibrate")
    if raw.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{path}: has format {raw.get('format_version')!r}, this software reads {FORMAT_VERSION}; update it"
        )
    try:
        return _read(raw)
    except KeyError as error:
        raise UsageError(f"{path}: lacks the key {error}; calibrate again") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: is damaged ({error!r}); calibrate again") from error


def _read(raw: dict[str, Any]) -> Calibration:
    idle, busy, cores = float(raw["idle_watts"]), float(raw["busy_watts"]), int(raw["cores"])
    if not (0 <= idle <= busy < float("inf") and cores > 0):
        raise ValueError(f"{idle} W idle, {busy} W busy, {cores} cores")
    return Calibration(
        idle,
        busy,
        cores,
        float(raw["residual_watts"]),
        str(raw["sensor"]),
        str(raw["scope"]),
        str(raw["covers"]),
        tuple(Level(float(level["utilisation"]), float(level["watts"])) for level in raw.get("levels", [])),
        float(raw.get("created_unix_s", 0.0)),
    )
