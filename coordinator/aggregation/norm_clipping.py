"""Norm clipping: no update moves the model further than others do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.capping import most
from coordinator.aggregation.robust import Robust

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import Round, State, Sums
    from edge_runtime.compression import Update


class NormClipping(Robust):
    """Sun et al., "Can You Really Backdoor Federated Learning?", 2019: norm thresholding.

    The change is the mean of the updates, each shortened to an L2 norm of at most ``max_norm``, or, where that is 0, of
    ``multiple`` times the median norm of the round (of an even number the lower one), so nothing counts where most send
    zeros. It bounds what a liar can add, and does not take it out: with many
    liars combine it with small steps, or take another method. Options: ``max_norm`` (0) and ``multiple`` (1.0; 0 clips
    nothing). Updates are equals, whatever samples they claim.
    """

    name: ClassVar[str] = "norm_clipping"
    defaults: ClassVar[Mapping[str, float]] = {"max_norm": 0.0, "multiple": 1.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"max_norm": (0.0, math.inf), "multiple": (0.0, math.inf)}

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The mean of the clipped updates; each is decoded twice."""
        entries = round_.contributions
        norms = dict(zip((entry.update for entry in entries), round_.each("delta", entries, _norm), strict=True))
        longest = self.options["max_norm"] or most(norms.values(), self.options["multiple"])
        change = round_.total(
            "delta", lambda entry: min(1.0, longest / norms[entry.update] if norms[entry.update] else 1.0)
        )
        change /= len(norms)
        return change, state


def _norm(update: Update) -> float:
    return update.norm()
