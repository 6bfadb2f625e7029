"""Measures many graphs against one anchor, so that the drift of the machine between them divides out.

Other load, heat and clocks move the cost of the same graph by several per cent within minutes, more than two layers
differ that must be told apart. So graphs are measured in rounds, each of them once per round in a new order and the
anchor before and after, and what counts is the ratio of a graph to the anchor of its round. At the end ratios are
multiplied by the median of the anchor over all rounds (A/B/A, Luis Cruz, Green Software Engineering Done Right).
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from energy.thor.profile import Cost

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping

    from energy.thor.probing import Reading, Stepper
    from energy.thor.profile import Quantity

MINIMUM_ROUNDS = 3
LEAST_RATIOS = 2  # one alone has no error
MAXIMUM_ROUNDS = 4  # then other sizes tell more, and rounds at another time
TOLERANCE = 0.04
# Two-sided 95 % of Student's t for 1, 2, ... degrees of freedom.
_T = (12.7, 4.3, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_LEAST_ERROR = 0.002

Ratios = dict["Quantity", list[float]]


class Limits(NamedTuple):
    """When a graph is measured well enough: relative half-width of the 95 % interval, or so many rounds."""

    tolerance: float = TOLERANCE
    minimum: int = MINIMUM_ROUNDS
    maximum: int = MAXIMUM_ROUNDS


class Anchor:
    """The graph that others are measured against; remembers what it cost in every round."""

    def __init__(self, stepper: Stepper, gauge: Callable[[Stepper], Reading]) -> None:
        self._stepper = stepper
        self._gauge = gauge
        self._seen: dict[Quantity, list[float]] = {}

    def take(self) -> dict[Quantity, float]:
        """One burst."""
        costs = self._gauge(self._stepper).costs
        for quantity, value in costs.items():
            self._seen.setdefault(quantity, []).append(value)
        return costs

    def median(self, quantity: Quantity) -> float | None:
        """Its cost per step over all rounds; None if it was never measured."""
        values = self._seen.get(quantity)
        return statistics.median(values) if values else None


def measure(
    steppers: Mapping[str, Stepper],
    anchor: Anchor,
    gauge: Callable[[Stepper], Reading],
    rng: random.Random,
    *,
    limits: Limits = Limits(),  # noqa: B008  immutable
    ended: Callable[[], bool] = lambda: False,
) -> dict[str, Ratios]:
    """Ratios to the anchor, by graph and quantity, one per round.

    Args:
        steppers: warmed up, by name.
        anchor: warmed up as well.
        gauge: takes one burst.
        rng: orders each round.
        limits: when to stop.
        ended: asked after each round from the minimum on; true stops.
    """
    found: dict[str, Ratios] = {name: {} for name in steppers}
    open_names = list(steppers)
    for done in range(limits.maximum):
        if not open_names or (done >= limits.minimum and ended()):
            break
        rng.shuffle(open_names)
        before = anchor.take()
        bursts = {name: gauge(steppers[name]).costs for name in open_names}
        after = anchor.take()
        for name, costs in bursts.items():
            for quantity, value in costs.items():
                mean = (before.get(quantity, 0.0) + after.get(quantity, 0.0)) / 2
                # A coarse counter that did not move tells nothing.
                if quantity in before and quantity in after and mean > 0 and value > 0:
                    found[name].setdefault(quantity, []).append(value / mean)
        if done + 1 >= limits.minimum:
            open_names = [name for name in open_names if not _tight(found[name], limits)]
    return found


def cost(ratios: list[float], scale: float, less: float = 0.0, share: int = 1) -> Cost:
    """Cost per run from ratios: ``(ratio * scale - less) / share``, at least a twentieth of ``less``.

    Args:
        ratios: to the anchor, at least :data:`LEAST_RATIOS`.
        scale: cost of the anchor.
        less: what a run costs by itself, that is no part of the layer.
        share: how often the layer is in the graph.
    """
    middle = statistics.median(ratios)
    gross = middle * scale
    net = max(gross - less, 0.05 * less)
    error = half_width(ratios) / _t(len(ratios)) * gross / net
    return Cost(mean=net / share, relative_error=max(error, _LEAST_ERROR), repeats=len(ratios))


def half_width(values: list[float]) -> float:
    """Relative half-width of the 95 % interval of the mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    middle = statistics.median(values)
    # Robust: one burst in which another process ran must not widen all.
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    plain = statistics.stdev(values)
    return _t(len(values)) * min(plain, 2 * spread if spread > 0 else plain) / math.sqrt(len(values)) / middle


def _t(count: int) -> float:
    return _T[min(max(count, 2) - 2, len(_T) - 1)]


def _tight(ratios: Ratios, limits: Limits) -> bool:
    return bool(ratios) and all(half_width(values) <= limits.tolerance for values in ratios.values())
