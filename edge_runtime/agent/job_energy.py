"""What one job drew, from the windows measured over it: which figures can stand, and what speaks against them.

A figure that is less than its own uncertainty, or of another time than the worker means, is unknown. What a job drew
beside its two phases is the rest of its whole window, so it is unknown where the whole is, or training. Compression
that was too short to be known is in the rest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.messages import EnergyUse

if TYPE_CHECKING:
    from edge_runtime.agent.pipe import Phase
    from energy.metering.measurement import Measurement

_NOISE = 1e-9  # what is left of a difference of floats that should be 0
LATE_S, LATE = 0.02, 0.2  # how much longer (and shorter) than the worker's own time a window may be


class Worked(NamedTuple):
    """Wall and CPU seconds of the two phases by the worker's own clocks; 0: unknown, or there was none."""

    train_s: float = 0.0
    compress_s: float = 0.0
    train_cpu_s: float = 0.0
    compress_cpu_s: float = 0.0


UNTOLD = Worked()


class Idle(NamedTuple):
    """The idle power before a job, and the name of the sensor that it is of."""

    sensor: str
    watts: float


def energy_use(
    job: Measurement | None,
    phases: dict[Phase, Measurement],
    worked: Worked,
    *,
    radio_joules: float | None,
    core_watts: float | None = None,
    idle: Idle | None = None,
) -> EnergyUse | None:
    """What a job drew; None if nothing of it is known.

    Args:
        job: from its start to its end; None: nothing measures here.
        phases: those that began.
        worked: a window that the agent opened or closed too late to fit these times says nothing.
        radio_joules: modelled, of its transfers.
        core_watts: what a busy core adds, where that of the agent is all that the whole window models: then the
            worker's CPU time is exact, and the windows of the phases are not needed.
        idle: taken only where it is of the same sensor as the job.
    """
    train, compress = (_phase(phases.get(name), seconds) for name, seconds in _times(worked))
    figures = {name: found for name, found in (("train", train), ("compress", compress)) if found is not None}
    joules = {name: found.joules for name, found in figures.items()}
    if core_watts is not None and worked.train_s > 0:
        joules = {"train": core_watts * worked.train_cpu_s, "compress": core_watts * worked.compress_cpu_s}
    other = None
    if job is not None and _says_something(job):
        figures["job"] = job
        if "train" in joules or "train" not in phases:
            other = _rest(job, joules, figures)
    if not joules and other is None and radio_joules is None:
        return None
    sources = [found.source for found in figures.values() if found.source is not None]
    sensor = sources[-1].sensor if sources else ""  # of the whole job, where that is known
    known = bool(joules) or other is not None
    return EnergyUse(
        train_mj=_milli(joules.get("train")),
        compress_mj=_milli(joules.get("compress")),
        other_mj=_milli(other),
        radio_mj=_milli(radio_joules),
        idle_mw=_milli(idle.watts) if known and idle is not None and idle.sensor == sensor else None,
        sensor=sensor if known else "",
        modelled=known and any(source.modelled for source in sources),
        doubtful=known and bool(problems(job, phases)),
    )


def problems(job: Measurement | None, phases: dict[Phase, Measurement]) -> tuple[str, ...]:
    """What speaks against the figures of a job, in words.

    What happened while it compressed is in the whole window too; that this phase is short speaks against it alone, and
    its figure is unknown where that says something.
    """
    found = [measured.problems for measured in (job, phases.get("train")) if measured is not None]
    return tuple(dict.fromkeys(text for texts in found for text in texts))


def described(use: EnergyUse) -> str:
    """What a job drew, for the log."""
    how = ("modelled" if use.modelled else "measured") + (", doubtful" if use.doubtful else "")
    parts = [
        (use.train_mj, f"training, {how}"),
        (use.compress_mj, f"compression, {how}"),
        (use.other_mj, f"loading and evaluating, {how}"),
        (use.radio_mj, "radio, modelled"),
    ]
    return ", ".join(f"{1e-3 * value:.3g} J ({name})" for value, name in parts if value is not None)


def _times(worked: Worked) -> tuple[tuple[Phase, float], tuple[Phase, float]]:
    return ("train", worked.train_s), ("compress", worked.compress_s)


def _phase(found: Measurement | None, worker_s: float) -> Measurement | None:
    if found is None or not _says_something(found):
        return None
    in_time = worker_s <= 0 or (1 - LATE) * worker_s <= found.seconds <= (1 + LATE) * worker_s + LATE_S
    return found if in_time else None


def _says_something(found: Measurement) -> bool:
    """Whether a figure is more than noise."""
    if found.joules is None or found.source is None:
        return False
    return found.half_width_joules is None or found.half_width_joules < found.joules or found.joules == 0


def _rest(job: Measurement, joules: dict[str, float | None], figures: dict[str, Measurement]) -> float | None:
    """What is left of the whole job; None if that is less than what is uncertain about it."""
    assert job.joules is not None
    rest = job.joules - sum(value for value in joules.values() if value is not None)
    if job.source is not None and job.source.modelled:
        return max(0.0, rest)
    noise = math.hypot(*(found.half_width_joules or 0.0 for found in figures.values()))
    return rest if rest >= noise else None


def _milli(value: float | None) -> int | None:
    """Thousandths; at least 1 of anything above 0, so that what is small does not read as nothing."""
    if value is None or value <= _NOISE:
        return None if value is None else 0
    return max(1, round(1000 * value))
