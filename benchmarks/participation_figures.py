"""What runs of the simulator come to: energy and time to an accuracy, waste, fairness, and ratios paired by seed."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 10_000


class Point(NamedTuple):
    """An evaluated model: virtual seconds since the start, what the fleet has used by then, accuracy on the test set.

    Energies are from the device model of the traces.
    """

    seconds: float
    wh: float
    accuracy: float


class Measures(NamedTuple):
    """One run. ``counted``: updates that went into a model, by device; ``device_accuracy`` likewise."""

    points: list[Point]
    wh: float
    wasted_wh: float
    lost: int
    counted: list[int]
    device_accuracy: list[float]
    seconds: float
    versions: int
    device_rounds: int


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Every evaluated model with the mean accuracy of it and the two before it: single ones are up and down."""
    triples = zip(points, points[1:], points[2:], strict=False)
    return [
        last._replace(accuracy=(first.accuracy + second.accuracy + last.accuracy) / 3)
        for first, second, last in triples
    ]


def reach(run: Measures, target: float) -> Point | None:
    """When the mean of three evaluated models in a row first has the accuracy."""
    return next((point for point in smoothed(run.points) if point.accuracy >= target), None)


def jain(counts: Sequence[int]) -> float:
    """Jain's index: 1 if all have the same count, 1/n if one has all; None of nobody counted is 0."""
    total = sum(counts)
    return total * total / (len(counts) * sum(count * count for count in counts)) if total else 0.0


def summary(runs: Sequence[Measures], random: Sequence[Measures], targets: Sequence[float]) -> dict[str, Any]:
    """One flat result out of the runs of one policy, and those of random selection of the same seeds in order."""
    found: dict[str, Any] = {}
    for number, target in enumerate(targets, 1):
        mine, theirs = [reach(run, target) for run in runs], [reach(run, target) for run in random]
        found[f"target_{number}"] = target
        found[f"reached_{number}"] = sum(point is not None for point in mine)
        found[f"wh_to_target_{number}"] = _median([math.inf if p is None else p.wh for p in mine])
        found[f"seconds_to_target_{number}"] = _median([math.inf if p is None else p.seconds for p in mine], digits=0)
        ratios = _ratios(mine, theirs, random)
        found[f"wh_ratio_{number}"] = _median(ratios)
        found[f"wh_ratio_{number}_low"], found[f"wh_ratio_{number}_high"] = interval(ratios)
    lost = sum(run.lost for run in random)
    found |= {
        "wasted_fraction": _median([run.wasted_wh / run.wh if run.wh else 0.0 for run in runs], digits=4),
        "devices_lost_to_battery": _median([run.lost for run in runs], digits=1),
        "lost_ratio": round(sum(run.lost for run in runs) / lost, 4) if lost else None,
        "jain": _median([jain(run.counted) for run in runs]),
        "p10_device_accuracy": _median([float(np.quantile(run.device_accuracy, 0.1)) for run in runs], digits=4),
        "best_accuracy": _median([max(point.accuracy for point in smoothed(run.points)) for run in runs], digits=4),
        "wh": _median([run.wh for run in runs]),
        "versions": _median([run.versions for run in runs], digits=0),
        "device_rounds": _median([run.device_rounds for run in runs], digits=0),
    }
    return found


def interval(ratios: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the median (percentiles of medians of seeds drawn with replacement)."""
    if not ratios:
        return None, None
    drawn = np.random.default_rng(0).choice(np.array(ratios), (RESAMPLES, len(ratios)))
    with np.errstate(invalid="ignore"):
        medians = np.sort(np.nan_to_num(np.median(drawn, axis=1), nan=np.inf, posinf=np.inf))
    low, high = (float(medians[int(share * (RESAMPLES - 1))]) for share in (0.025, 0.975))
    return _finite(low, 3), _finite(high, 3)


def _ratios(mine: list[Point | None], theirs: list[Point | None], random: Sequence[Measures]) -> list[float]:
    """Energy over random's, seed by seed; a target missed is infinite, and random that missed it counts all it used."""
    found = []
    for point, other, run in zip(mine, theirs, random, strict=True):
        if point is None and other is None:
            continue
        base = run.wh if other is None else other.wh
        found.append(math.inf if point is None else point.wh / base)
    return found


def _median(values: Sequence[float], *, digits: int = 3) -> float | None:
    return _finite(statistics.median(values), digits) if values else None


def _finite(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
