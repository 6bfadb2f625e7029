"""One kind of layer while a device is profiled: its candidates, its points, and how much more it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from energy.thor import active, interleave
from energy.thor.features import Floats, flops
from energy.thor.fitting import MINIMUM_POINTS, fit
from energy.thor.process import Process, prior
from energy.thor.profile import Cost, Point, Quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.thor.layers import LayerSpec, Sizes
    from energy.thor.pack import Probe

_REFIT_EVERY = 4


class Measured(NamedTuple):
    """One probe that was measured: ratios to the anchor, by quantity."""

    probe: Probe
    sizes: Sizes
    ratios: interleave.Ratios


class Kind:
    """What is known of one kind of layer.

    Args:
        kind: its name.
        candidates: probes that may be measured.
        references: layers of the user's models, which it will be asked about.
        batch: samples per step.
        known: points of an earlier session.
    """

    def __init__(
        self, kind: str, candidates: list[Probe], references: list[LayerSpec], batch: int, known: list[Point]
    ) -> None:
        self.kind = kind
        self.references = references
        self.done: list[Measured] = []
        self._candidates = candidates
        self._batch = batch
        self._known = known
        self._parameters: dict[str, list[float]] | None = None
        self._fitted_with = 0

    def left(self, most: int) -> list[Probe]:
        """Probes that were not measured yet; none if ``most`` points are there."""
        if len(self.done) >= most:
            return []
        taken = {id(item.probe) for item in self.done}
        known = [point.sizes for point in self._known]
        return [p for p in self._candidates if id(p) not in taken and p.spec(self._batch).sizes not in known]

    def add(self, measured: Measured) -> None:
        """Takes a probe that was measured, or more rounds of one."""
        for item in self.done:
            if item.probe is measured.probe:
                for quantity, ratios in measured.ratios.items():
                    item.ratios.setdefault(quantity, []).extend(ratios)
                return
        self.done.append(measured)

    def points(self, anchor: interleave.Anchor, fixed: dict[Quantity, float]) -> list[Point]:
        """All points, without what a run costs by itself, and without what was metered but once."""
        found = list(self._known)
        for item in self.done:
            costs: dict[Quantity, Cost] = {}
            for quantity, ratios in item.ratios.items():
                scale = anchor.median(quantity)
                if scale is not None and len(ratios) >= interleave.LEAST_RATIOS:
                    costs[quantity] = interleave.cost(ratios, scale, fixed.get(quantity, 0.0), item.probe.runs)
            if costs:
                found.append(Point(sizes=item.sizes, costs=costs))
        return found

    def belief(self, points: Sequence[Point], quantity: Quantity, *, fitted: bool) -> Process:
        """What is known of its costs; fitted again whenever some points have come in, if SciPy may be used."""
        usable = [point for point in points if quantity in point.costs]
        sizes = [point.sizes for point in usable]
        if not fitted or len(usable) < MINIMUM_POINTS:
            asked = [spec.sizes for spec in self.references]
            return prior(self.kind, [*(probe.spec(self._batch).sizes for probe in self._candidates), *asked, *sizes])
        means = [point.costs[quantity].mean for point in usable]
        errors = [point.costs[quantity].relative_error for point in usable]
        if self._parameters is None or len(usable) - self._fitted_with >= _REFIT_EVERY:
            self._parameters = fit(self.kind, sizes, means, errors, quick=True).parameters
            self._fitted_with = len(usable)
        # Points that came in since then are as good as any.
        doubt = [*self._parameters["doubt"], *[1.0] * (len(usable) - self._fitted_with)]
        return Process(self.kind, sizes, means, errors, parameters={**self._parameters, "doubt": doubt})

    def next(
        self, points: Sequence[Point], quantity: Quantity, count: int, *, most: int, fitted: bool = True
    ) -> list[Probe]:
        """Up to ``count`` probes that tell most about the references, while there are less than ``most`` points."""
        candidates = self.left(most)
        process = self.belief(points, quantity, fitted=fitted)
        sizes = [probe.spec(self._batch).sizes for probe in candidates]
        references = [spec.sizes for spec in self.references] or sizes
        count = min(count, most - len(self.done))
        chosen = active.choose(process, sizes, references, count)
        return [candidates[index] for index in chosen]

    def _costs(self, points: Sequence[Point], quantity: Quantity) -> Floats:
        """What each reference costs in its model, about, by FLOPs."""
        rates = [
            point.costs[quantity].mean / flops(self.kind, point.sizes) for point in points if quantity in point.costs
        ]
        rate = float(np.median(rates)) if rates else 1.0
        return np.array([spec.calls * rate * flops(self.kind, spec.sizes) for spec in self.references], np.float64)

    def need(self, points: Sequence[Point], quantity: Quantity, *, fitted: bool) -> float:
        """How much its uncertainty adds to that of the models, as a standard deviation."""
        costs = self._costs(points, quantity)
        if not fitted or len(points) < MINIMUM_POINTS or not self.references:
            return float(costs.sum() / np.sqrt(max(len(points), 1)))
        process = self.belief(points, quantity, fitted=True)
        mean, covariance = process.posterior([spec.sizes for spec in self.references])
        means = np.array([spec.calls for spec in self.references]) * np.exp(mean)
        return float(np.sqrt(max(means @ covariance @ means, 0.0)))
