"""Uniformly random devices, all with the plan's own work: the baseline every other selector is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coordinator.aggregation.options import take_options
from coordinator.scheduling.base import Memoryless, Selection
from coordinator.scheduling.draws import chances, draw
from coordinator.scheduling.notes import Marks
from coordinator.scheduling.roles import draw_anchors
from coordinator.scheduling.table import Table, willing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import RoundRequest


class RandomSelector(Memoryless):
    """McMahan et al. 2017, algorithm 1: a uniformly random subset without replacement, of those who do not decline.

    Uniform among devices whose last jobs did not fail; one that failed has ``1 / (1 + failures)`` of their weight,
    forgotten over some rounds, so that silent devices do not hold up every round.

    Options:
        anchor_probability: 0 to 1; each chosen device that can be an anchor is one with this probability. For server
            methods that know the role (FedAMD).
    """

    name: ClassVar[str] = "random"

    def __init__(self, *, anchor_probability: float = 0.0) -> None:
        self.anchor_probability = anchor_probability

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> RandomSelector:
        return cls(**take_options(options, {"anchor_probability": 0.0}, {"anchor_probability": (0.0, 1.0)}))

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        table, marks = Table(fleet, request, now), Marks(request.candidates)
        ready = np.flatnonzero(willing(table, marks))
        weights = table.fade[ready]
        rows = draw(request.random, ready, weights, request.count)
        marks.figure("chance", chances(weights, request.count), ready)
        marks.mark(ready, "lost the draw (p={chance:.2g})")
        marks.mark(rows, "drawn uniformly (p={chance:.2g})")
        faded = rows[table.fade[rows] < 1.0]
        marks.mark(faded, "drawn, though seldom after its failures (p={chance:.2g})")
        choices = [request.choice(request.candidates[row]) for row in rows.tolist()]
        able = table.has("anchor") if self.anchor_probability else np.zeros(table.count, bool)
        choices = draw_anchors(request.random, choices, able, rows, self.anchor_probability)
        return Selection(choices=choices, notes=marks.table())
