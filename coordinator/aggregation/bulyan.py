"""Bulyan: Krum again and again, then what of the chosen lies around their median."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.robust import WIDTH, Byzantine, square_distances

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from coordinator.aggregation.base import Round, State, Sums


class Bulyan(Byzantine):
    """El Mhamdi et al., "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018.

    Krum chooses one of ``n`` updates after the other, each time among those left, until there are
    ``n - 2 * byzantine``; every number of the change is the mean of those ``n - 4 * byzantine`` of the chosen values
    that lie nearest to their median. So no number can hide behind a small distance in all others. It takes
    ``n >= 4 * byzantine + 3``. Option ``byzantine`` (1); 0 is the plain mean. Updates are equals, whatever samples they
    claim.
    """

    name: ClassVar[str] = "bulyan"
    slope: ClassVar[int] = 4
    offset: ClassVar[int] = 3

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The mean around the median, some columns at a time."""
        import numpy as np

        rows = round_.matrix("delta")
        liars = self.liars(len(rows))
        chosen = _choose(square_distances(round_, rows), liars) if liars else list(range(len(rows)))
        change = np.empty(round_.layout.size, np.float64)
        for part in round_.columns(WIDTH):
            change[part] = _around_median(rows[chosen, part], len(chosen) - 2 * liars)
        return change, state


def _choose(squares: npt.NDArray[np.float64], liars: int) -> list[int]:
    """Positions of ``n - 2 * liars`` updates, ascending.

    Sorted once: who is chosen goes out of the others' neighbours. That is ``n^2`` copied numbers a choice, ``n^3`` in
    all, less than the ``n^2 d`` products of the distances while there are fewer updates than parameters.
    """
    import numpy as np

    order = np.argsort(squares, axis=1, kind="stable").astype(np.int32)
    order = order[order != np.arange(len(squares))[:, None]].reshape(len(squares), -1)  # no one is its own neighbour
    near = np.take_along_axis(squares, order, axis=1)
    left, chosen = np.arange(len(squares)), []
    for _ in range(len(squares) - 2 * liars):
        scores = near[:, : max(1, len(left) - liars - 2)].sum(axis=1)
        position = int(scores.argmin())
        chosen.append(int(left[position]))
        left = np.delete(left, position)
        near, order = np.delete(near, position, axis=0), np.delete(order, position, axis=0)
        kept = order != chosen[-1]
        near, order = near[kept].reshape(len(left), -1), order[kept].reshape(len(left), -1)
    return sorted(chosen)


def _around_median(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float64]:
    """Of every column the mean of the ``count`` values nearest to the median, float64."""
    import numpy as np

    ordered = np.sort(values, axis=0).astype(np.float64)
    total = len(ordered)
    median = ordered[slice((total - 1) // 2, total // 2 + 1)].mean(axis=0)
    # The nearest ones lie side by side in a sorted column: of all windows that of the least reach.
    windows = [ordered[start : start + count] for start in range(total - count + 1)]
    reach = np.stack([np.maximum(median - window[0], window[-1] - median) for window in windows])
    means = np.stack([window.mean(axis=0) for window in windows])
    chosen: npt.NDArray[np.float64] = np.take_along_axis(means, reach.argmin(axis=0)[None], axis=0)[0]
    return chosen
