"""AFA-CD: anarchic updates of any number of steps, each by its step count, averaged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.fedavg import FedAvg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import Contribution, Round, State, Sums
    from edge_runtime.messages import UpdateMeta


class AfaCd(FedAvg):
    """Yang et al., "Anarchic Federated Learning", ICML 2022: AFA-CD, for devices.

    The change is ``K / n * sum(delta_i / K_i)``: every device counts alike, however many steps ``K_i`` it chose.
    Option ``reference_steps``: ``K``, the steps that a change stands for; 0 (the default) takes the mean of the round's
    ``K_i``, so that with equal ``K_i`` the change is the plain mean. The paper's server learning rate is that of the
    optimiser.

    ``K_i`` is what a device claims, so few steps must not buy much: no update is multiplied by more than ``weight_cap``
    (10; 0: any), as if a device had taken at least ``K / weight_cap`` steps. In the mean for ``K`` no ``K_i`` counts
    more than ``weight_cap`` times their median.
    """

    name: ClassVar[str] = "afa_cd"
    defaults: ClassVar[Mapping[str, float]] = {"reference_steps": 0.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"reference_steps": (0.0, math.inf)}

    def accept(self, meta: UpdateMeta, staleness: int) -> str:  # noqa: ARG002
        """Nothing can be said of an update without steps."""
        return "" if meta.steps > 0 else f"server method {self.name!r} divides by steps, and the update says 0"

    def weight(self, meta: UpdateMeta, staleness: int) -> float:  # noqa: ARG002
        """All alike."""
        return 1.0

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The mean of normalised updates."""
        reference = self.reference(round_)
        change = round_.total("delta", lambda update: reference / self.steps(update, reference))
        change /= len(round_.contributions)
        return change, state

    def reference(self, round_: Round) -> float:
        """``K``."""
        steps = [update.meta.steps for update in round_.contributions]
        highest = self.most(steps)
        return self.options["reference_steps"] or sum(min(count, highest) for count in steps) / len(steps)

    def steps(self, update: Contribution, reference: float) -> float:
        """``K_i`` as it counts where ``K`` is ``reference``."""
        cap = self.options["weight_cap"]
        return max(update.meta.steps, reference / cap) if cap else update.meta.steps
