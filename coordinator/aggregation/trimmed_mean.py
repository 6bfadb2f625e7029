"""The coordinate-wise mean without the largest and the smallest values."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.robust import WIDTH, Robust

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from coordinator.aggregation.base import Round, State, Sums


class TrimmedMean(Robust):
    """Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, definition 2.

    Of ``n`` values of a number, ``floor(fraction * n)`` are left out at either end, so as many liars are stood. Option
    ``fraction`` (0.2, below 0.5); 0 is the plain mean. Updates are equals, whatever samples they claim.
    """

    name: ClassVar[str] = "trimmed_mean"
    defaults: ClassVar[Mapping[str, float]] = {"fraction": 0.2}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"fraction": (0.0, 0.4999)}

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The trimmed mean, some columns at a time."""
        rows = round_.matrix("delta")
        return trimmed(round_, rows, int(self.options["fraction"] * len(rows) + 1e-9)), state


def trimmed(round_: Round, rows: npt.NDArray[np.float32], ends: int) -> Sums:
    """The mean of every column without ``ends`` values at either end, float64 ``[size]``."""
    import numpy as np

    change = np.empty(round_.layout.size, np.float64)
    for part in round_.columns(WIDTH):
        block = rows[:, part]
        if ends:
            block = np.sort(block, axis=0)[ends : len(rows) - ends]
        change[part] = block.mean(axis=0, dtype=np.float64)
    return change
