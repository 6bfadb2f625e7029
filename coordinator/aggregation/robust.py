"""What robust methods share: equal votes, the number of liars that a round can stand, distances between updates."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.fedavg import FedAvg
from coordinator.aggregation.options import whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from coordinator.aggregation.base import Round
    from edge_runtime.messages import UpdateMeta

log = logging.getLogger("edge.coordinator")

WIDTH = 1 << 15  # columns of the updates' matrix that are worked on at a time


class Robust(FedAvg):
    """Base of methods in which every update has one vote: samples and age buy no weight, since a liar may claim any."""

    capped: ClassVar[bool] = False

    def weight(self, meta: UpdateMeta, staleness: int) -> float:  # noqa: ARG002
        """All alike."""
        return 1.0


class Byzantine(Robust):
    """Base of methods with the option ``byzantine``: so many updates of a round may hold anything (0 or more, 1).

    They need ``slope * byzantine + offset`` updates for it. In a round with fewer, the most that these allow is stood,
    and the log says so.
    """

    defaults: ClassVar[Mapping[str, float]] = {"byzantine": 1.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"byzantine": (0.0, math.inf)}
    slope: ClassVar[int] = 2
    offset: ClassVar[int] = 1

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        super().__init__(options)
        self.byzantine = whole(self.options, "byzantine")
        self.least = self.slope * self.byzantine + self.offset

    def liars(self, count: int) -> int:
        """How many of ``count`` updates may lie."""
        allowed = max(0, min(self.byzantine, (count - self.offset) // self.slope))
        if allowed < self.byzantine:
            log.warning(
                "%s: %d updates stand %d liars, not the %d that the plan names; it takes %d updates for them",
                *(self.name, count, allowed, self.byzantine, self.least),
            )
        return allowed


def square_distances(round_: Round, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Squared L2 distances between all pairs of rows, ``[n, n]``, symmetric, 0 on the diagonal."""
    import numpy as np

    products = np.zeros((len(rows), len(rows)), np.float64)
    for part in round_.columns(WIDTH):
        block = rows[:, part].astype(np.float64)
        products += block @ block.T
    norms = np.diag(products)
    squares: npt.NDArray[np.float64] = np.maximum(norms[:, None] + norms[None, :] - 2.0 * products, 0.0)
    squares = np.minimum(squares, squares.T)
    np.fill_diagonal(squares, 0.0)
    return squares


def krum_scores(squares: npt.NDArray[np.float64], liars: int) -> npt.NDArray[np.float64]:
    """Of each of ``n`` updates the sum of squared distances to its ``n - liars - 2`` nearest others (at least one)."""
    import numpy as np

    count = len(squares)
    nearest = np.sort(squares, axis=1)[:, 1:]  # the first is the update itself
    scores: npt.NDArray[np.float64] = nearest[:, : max(1, count - liars - 2)].sum(axis=1)
    return scores


def smallest(values: npt.NDArray[np.float64], count: int) -> list[int]:
    """Positions of the ``count`` smallest values, of equal ones the first, in ascending order."""
    import numpy as np

    return sorted(np.argsort(values, kind="stable")[:count].tolist())


def mean_of(round_: Round, chosen: Sequence[int]) -> npt.NDArray[np.float64]:
    """The mean of the round's updates at these positions, float64 ``[size]``."""
    names = {round_.contributions[position].update for position in chosen}
    change = round_.total("delta", lambda update: 1.0 if update.update in names else 0.0)
    change /= len(names)
    return change
