"""Krum and multi-Krum: the updates that are nearest to most others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.options import whole
from coordinator.aggregation.robust import Byzantine, krum_scores, mean_of, smallest, square_distances

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import Round, State, Sums


class Krum(Byzantine):
    """Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017: Krum and multi-Krum.

    The score of an update is the sum of squared distances to its ``n - byzantine - 2`` nearest others; the change is
    the mean of the ``keep`` updates of least score. It takes ``n >= 2 * byzantine + 3``. Options: ``byzantine`` (1) and
    ``keep`` (1: Krum itself; 0: ``n - byzantine - 2``, but at least 1; more: multi-Krum of so many, at most
    ``n - byzantine``). ``byzantine = 0`` with ``keep`` of ``n`` or more is the plain mean. Updates are equals, whatever
    samples they claim.
    """

    name: ClassVar[str] = "krum"
    defaults: ClassVar[Mapping[str, float]] = {"byzantine": 1.0, "keep": 1.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"byzantine": (0.0, math.inf), "keep": (0.0, math.inf)}
    offset: ClassVar[int] = 3

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        super().__init__(options)
        self.keep = whole(self.options, "keep")

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The mean of the chosen updates."""
        count = len(round_.contributions)
        if count == 1:
            return mean_of(round_, [0]), state
        liars = self.liars(count)
        keep = max(1, min(self.keep or count - liars - 2, count - liars))
        scores = krum_scores(square_distances(round_, round_.matrix("delta")), liars)
        return mean_of(round_, smallest(scores, keep)), state
