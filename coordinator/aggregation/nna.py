"""Nearest-neighbour averaging: every update is mixed with its nearest before extremes are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.robust import WIDTH, Byzantine, square_distances

if TYPE_CHECKING:
    from coordinator.aggregation.base import Round, State, Sums


class Nna(Byzantine):
    """Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead" (MoNNA), ICML 2023.

    There each device takes the mean of its own and the vectors nearest to it. A server has none of its own, so it does
    this for all (Allouah et al., "Fixing by Mixing", AISTATS 2023): each of ``n`` updates becomes the mean
    of the ``n - byzantine`` nearest to it, itself included, and of these every number is averaged without
    ``byzantine`` values at either end. It takes ``n >= 2 * byzantine + 1``; devices with differing data cost it less
    than Krum. Option ``byzantine`` (1); 0 is the plain mean. Updates are equals, whatever samples they claim.
    """

    name: ClassVar[str] = "nna"

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The trimmed mean of the mixed updates, some columns at a time."""
        import numpy as np

        rows = round_.matrix("delta")
        count = len(rows)
        liars = self.liars(count)
        order = np.argsort(square_distances(round_, rows), axis=1, kind="stable")[:, : count - liars]
        mixing = np.zeros((count, count), bool)
        np.put_along_axis(mixing, order, values=True, axis=1)
        change = np.empty(round_.layout.size, np.float64)
        for part in round_.columns(WIDTH):
            block = rows[:, part].astype(np.float64)
            mixed = np.stack([block[neighbours].mean(axis=0) for neighbours in mixing])
            change[part] = np.sort(mixed, axis=0)[liars : count - liars].mean(axis=0)
        return change, state
