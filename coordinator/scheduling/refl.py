"""REFL: those who will be least available come first, and fewer are asked while late updates are on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coordinator.aggregation.options import take_options, whole
from coordinator.scheduling.base import Selection
from coordinator.scheduling.draws import filled, uniforms
from coordinator.scheduling.notes import Marks
from coordinator.scheduling.table import Table, willing

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
    target* (section 4.1): ``N_t = max(1, N_0 - B_t)``, ``B_t`` the late updates that are expected. Only the first
    selection of a round in synchronous mode is cut: later ones replace devices that failed. That late updates count,
    and with which weight, is the server method's part (``server_method = "refl"``).

    Differences: devices predict the next hour, not one to two rounds from now. Of ties between devices none of which
    predicts anything, the plain median decides nothing, so it is a uniform draw.

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

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:  # noqa: ARG002
        table, marks = Table(fleet, request), Marks(request.candidates)
        ready = np.flatnonzero(willing(table, marks))
        likely = filled(table.availability, _UNKNOWN)
        rests = (table.last_round >= 0) & (request.round - table.last_round <= self.cool_down_rounds)
        marks.figure("availability", likely)
        marks.mark(ready, "others are less available (its own: {availability:.0%})")
        marks.mark(ready[rests[ready]], f"rests for {self.cool_down_rounds} rounds after it was asked")
        shuffled = uniforms(request.random, len(ready))
        order = np.lexsort((shuffled, np.where(rests[ready], 0.0, likely[ready]), rests[ready]))
        rows = ready[order[: self._target(request)]]
        marks.mark(rows, "among the least available ({availability:.0%})")
        marks.mark(rows[rests[rows]], "rests, but nobody else was left")
        choices = [request.choice(request.candidates[row]) for row in rows.tolist()]
        if choices:
            request.note_opened()
        return Selection(choices=choices, notes=marks.table())

    def _target(self, request: RoundRequest) -> int:
        if not (self.adaptive_target and request.opens_round and request.plan.participation.mode == "synchronous"):
            return max(0, request.count)
        return min(max(1, request.count - request.expected_late), request.count)

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
