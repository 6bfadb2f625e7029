"""The coordinate-wise median of the updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.robust import WIDTH, Robust

if TYPE_CHECKING:
    from coordinator.aggregation.base import Round, State, Sums


class Median(Robust):
    """Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 1.

    Every number of the change lies among those of honest updates as long as these are more than half. Of an even count
    it is the mean of the two in the middle. Updates are equals, whatever samples they claim.
    """

    name: ClassVar[str] = "median"

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The median, some columns at a time."""
        import numpy as np

        rows = round_.matrix("delta")
        middle = slice((len(rows) - 1) // 2, len(rows) // 2 + 1)
        change = np.empty(round_.layout.size, np.float64)
        for part in round_.columns(WIDTH):
            change[part] = np.sort(rows[:, part], axis=0)[middle].mean(axis=0, dtype=np.float64)
        return change, state
