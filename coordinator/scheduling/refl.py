"""REFL: those who will be least available come first, and fewer are asked while late updates are on their way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coordinator.aggregation.options import take_options, whole
from coordinator.scheduling.base import Selection
from coordinator.scheduling.draws import filled, uniforms
from coordinator.scheduling.notes import Marks
from coordinator.scheduling.openings import late_due, note_opened, opens_round
from coordinator.scheduling.table import Table, sits_out, willing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.events import HistoryRow
    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import Outcome, RoundRequest

_OPTIONS = {"cool_down_rounds": 5.0, "adaptive_target": 1.0}
_RANGES = {"cool_down_rounds": (0.0, 1e6), "adaptive_target": (0.0, 1.0)}
_UNKNOWN = 0.5  # availability, if no device predicts its own


class Refl:
    """Abdelmoniem et al., "REFL: resource-efficient federated learning", EuroSys 2023.

    *Intelligent participant selection* (section 4.1): devices that were not asked in the last rounds, by ascending
    availability as each predicts it for itself, ties shuffled; then the others, in random order. *Adaptive participant
    target* (section 4.1): ``N_t = max(1, N_0 - B_t)`` updates close the round, ``B_t`` the late ones that are expected
    in it (:mod:`coordinator.scheduling.openings`), and ``over_commit`` times as many are asked. Only the first
    selection of a round in synchronous mode is cut: later ones replace devices that failed. That late updates count,
    and with which weight, is the server method's part (``server_method = "refl"``).

    Differences: devices predict the next hour, not one to two rounds from now. Of ties between devices none of which
    predicts anything, the plain median decides nothing, so it is a uniform draw. A device that failed comes after those
    that have rested with the chance ``1 - fade``, else one that is never there would always come first.

    Options:
        cool_down_rounds: rounds that a device rests after it was asked.
        adaptive_target: 1 or 0, whether fewer are asked for expected late updates.
    """

    name: ClassVar[str] = "refl"

    def __init__(self, *, cool_down_rounds: int = 5, adaptive_target: bool = True) -> None:
        self.cool_down_rounds = cool_down_rounds
        self.adaptive_target = adaptive_target

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> Refl:
        taken = take_options(options, _OPTIONS, _RANGES)
        return cls(
            cool_down_rounds=whole(taken, "cool_down_rounds"), adaptive_target=bool(whole(taken, "adaptive_target"))
        )

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        table, marks = Table(fleet, request, now), Marks(request.candidates)
        ready = np.flatnonzero(willing(table, marks))
        likely = filled(table.availability, _UNKNOWN)
        rests = (table.last_round >= 0) & (request.round - table.last_round <= self.cool_down_rounds)
        marks.figure("availability", likely)
        marks.mark(ready, "others are less available (its own: {availability:.0%})")
        marks.mark(ready[rests[ready]], f"rests for {self.cool_down_rounds} rounds after it was asked")
        out = sits_out(table, marks)
        marks.mark(ready[out[ready]], "sits out after its failures (p={fade:.2g} not to)")
        last = rests | out
        shuffled = uniforms(request.random, len(ready))
        order = np.lexsort((shuffled, np.where(last[ready], 0.0, likely[ready]), out[ready], rests[ready]))
        wanted = self._target(now, request)
        rows = ready[order[: self._places(request, wanted)]]
        marks.mark(rows, "among the least available ({availability:.0%})")
        marks.mark(rows[last[rows]], "rests or sits out, but nobody else was left")
        choices = [request.choice(request.candidates[row]) for row in rows.tolist()]
        if choices:
            note_opened(now, request)
        goal = None if wanted is None else max(1, min(wanted, len(choices)))
        return Selection(choices=choices, notes=marks.table(), wanted=goal)

    def _target(self, now: float, request: RoundRequest) -> int | None:
        """``N_t`` where a round opens, else None."""
        if not (self.adaptive_target and opens_round(request)):
            return None
        return max(1, request.plan.participation.target - late_due(now, request))

    def _places(self, request: RoundRequest, wanted: int | None) -> int:
        """How many to choose: as many more than wanted as the plan over-commits."""
        if wanted is None:
            return max(0, request.count)
        return max(0, min(math.ceil(wanted * request.plan.participation.over_commit - 1e-9), request.count))

    def observe(self, device: str, outcome: Outcome, memory: dict[str, float]) -> None:
        """Learns nothing: the history has when it was asked."""

    def round_closed(
        self,
        round_: int,  # noqa: ARG002
        outcomes: Sequence[Outcome],  # noqa: ARG002
        histories: Mapping[str, HistoryRow],  # noqa: ARG002
        memory: dict[str, float],  # noqa: ARG002
    ) -> list[str]:
        """Learns nothing."""
        return []
