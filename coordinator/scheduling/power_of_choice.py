"""Power-of-choice: out of some devices drawn by their data, those with the highest loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coordinator.aggregation.options import take_options, whole
from coordinator.scheduling.base import Memoryless, Selection
from coordinator.scheduling.draws import clipped, draw, filled, uniforms
from coordinator.scheduling.notes import Marks
from coordinator.scheduling.table import Table, sits_out, willing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import RoundRequest


class PowerOfChoice(Memoryless):
    """Cho, Wang and Joshi, "Towards understanding biased client selection in federated learning", AISTATS 2022.

    Section 3, in the variant that asks no device for a loss first (rpow-d): ``d`` devices are drawn without
    replacement in proportion to their samples, and those of them with the highest loss of their last update are
    chosen. A device that was never counted has an infinite loss, one that does not say has the median. The loss is the
    root of the mean square, as devices report it. Samples are clipped to their 95 % value, so that none is always drawn
    because of what it claims. A device that failed is left for last with the chance ``1 - fade``, whatever its loss.

    Options:
        d: devices drawn; 0: three times as many as are wanted. Never fewer than wanted.
    """

    name: ClassVar[str] = "power_of_choice"

    def __init__(self, *, d: int = 0) -> None:
        self.d = d

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> PowerOfChoice:
        return cls(d=whole(take_options(options, {"d": 0.0}, {"d": (0.0, 1e9)}), "d"))

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        table, marks = Table(fleet, request, now), Marks(request.candidates)
        ready = np.flatnonzero(willing(table, marks))
        marks.mark(ready, "not among the {drawn:.0f} drawn by samples ({samples:.0f})")
        marks.figure("samples", table.samples)
        marks.figure("loss_rms", table.loss_rms)
        size = max(self.d or 3 * request.count, request.count)
        marks.figure("drawn", float(min(size, len(ready))), None)
        out = sits_out(table, marks)
        marks.mark(ready[out[ready]], "sits out after its failures (p={fade:.2g} not to)")
        awake = ready[~out[ready]]
        pool = awake if len(awake) >= request.count else ready
        drawn = draw(request.random, pool, clipped(table.samples[pool]), size)
        loss = np.where(table.counted[drawn] > 0, filled(table.loss_rms[drawn], 0.0), np.inf)
        order = np.lexsort((uniforms(request.random, len(drawn)), -loss, out[drawn]))
        rows, others = drawn[order[: max(0, request.count)]], drawn[order[max(0, request.count) :]]
        marks.mark(others, "drawn, but others had a higher loss ({loss_rms:.3g})")
        marks.mark(rows, "highest loss among those drawn ({loss_rms:.3g})")
        marks.mark(rows[np.isnan(table.loss_rms[rows])], "among those drawn, and its loss is not known")
        choices = [request.choice(request.candidates[row]) for row in rows.tolist()]
        return Selection(choices=choices, notes=marks.table())
