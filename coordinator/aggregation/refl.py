"""REFL's late-update reuse: a late update counts by its age and by how much it tells beside the fresh ones."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.fedavg import FedAvg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coordinator.aggregation.base import Contribution, Round, State, Sums
    from edge_runtime.compression import Update
    from edge_runtime.messages import UpdateMeta


class Refl(FedAvg):
    """Abdelmoniem et al., "REFL: Resource-Efficient Federated Learning", EuroSys 2023: staleness-aware aggregation.

    With ``u`` the mean of the ``n`` fresh updates and ``u_s`` a late one of staleness ``t``::

        L_s = |u - (u_s + n u) / (n + 1)|^2 / |u|^2
        w_s = (1 - beta) / (t + 1) + beta (1 - exp(-L_s / max L))

    Every update weighs its samples, a late one times ``w_s``, which is below 1 whatever it holds, and ``u`` is weighted
    so too (the paper has devices with as many samples each). Where no update is fresh, ``w_s`` is ``1 / (t + 1)``. No
    weight counts more than ``weight_cap`` (10; 0: any) times the median of the round's, nor of the fresh ones in ``u``.
    Option ``beta`` (0.35): how much the difference counts; 0 is FedAvg with ``staleness_exponent = 1``.
    """

    name: ClassVar[str] = "refl"
    defaults: ClassVar[Mapping[str, float]] = {"beta": 0.35}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"beta": (0.0, 1.0)}

    def weight(self, meta: UpdateMeta, staleness: int) -> float:
        """Samples, of late updates less: what they count without fresh ones."""
        return meta.samples / (1.0 + staleness)

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The weighted mean; late updates are decoded twice."""
        weight = self._weights(round_)
        heaviest = self.most(weight(update) for update in round_.contributions)
        change = round_.total("delta", lambda update: min(weight(update), heaviest))
        change /= sum(min(weight(update), heaviest) for update in round_.contributions)
        return change, state

    def _weights(self, round_: Round) -> Callable[[Contribution], float]:
        """By the formula, not bounded yet."""
        fresh = [update for update in round_.contributions if update.staleness == 0]
        late = [update for update in round_.contributions if update.staleness > 0]
        if not fresh or not late:
            return lambda update: update.weight
        heaviest = self.most(update.weight for update in fresh)
        mean = round_.total("delta", lambda update: min(update.weight, heaviest) if update.staleness == 0 else 0.0)
        mean /= sum(min(update.weight, heaviest) for update in fresh)
        told_by = round_.each("delta", late, partial(_deviation, mean=mean, fresh=len(fresh)))
        differences = dict(zip((update.update for update in late), told_by, strict=True))
        largest, beta = max(differences.values()), self.options["beta"]

        def weight(update: Contribution) -> float:
            if update.staleness == 0:
                return update.weight
            told = 1.0 - math.exp(-differences[update.update] / largest) if largest > 0 else 0.0
            return (1.0 - beta) * update.weight + beta * told * update.weight * (1.0 + update.staleness)

        return weight


def _deviation(late: Update, mean: Sums, fresh: int) -> float:
    """``L_s``; 0 where the fresh updates say nothing."""
    import numpy as np

    square = float(np.sum(mean * mean))
    difference = mean.copy()
    late.add_to(difference, -1.0)
    # u - (u_s + n u) / (n + 1) is (u - u_s) / (n + 1).
    return float(np.sum(difference * difference)) / (fresh + 1) ** 2 / square if square > 0 else 0.0
