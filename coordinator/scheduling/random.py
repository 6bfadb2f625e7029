"""Uniformly random devices, all with the plan's own work: the baseline every other selector is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.plugins import check_options
from coordinator.scheduling.base import Selection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.events import HistoryRow
    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import Outcome, RoundRequest


class RandomSelector:
    """McMahan et al. 2017, algorithm 1: a uniformly random subset without replacement."""

    name: ClassVar[str] = "random"

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> RandomSelector:
        check_options(options, {})
        return cls()

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:  # noqa: ARG002
        count = min(request.count, len(request.candidates))
        return Selection(
            choices=[request.choice(device) for device in request.random.sample(request.candidates, count)]
        )

    def observe(self, device: str, outcome: Outcome, memory: dict[str, float]) -> None:
        """Learns nothing."""

    def round_closed(
        self,
        round_: int,  # noqa: ARG002
        outcomes: Sequence[Outcome],  # noqa: ARG002
        histories: Mapping[str, HistoryRow],  # noqa: ARG002
        memory: dict[str, float],  # noqa: ARG002
    ) -> list[str]:
        """Learns nothing."""
        return []
