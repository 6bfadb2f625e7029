"""FedBuff: the buffered asynchronous mean; updates weigh by age alone and the buffer's size divides."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.fedavg import FedAvg

if TYPE_CHECKING:
    from coordinator.aggregation.base import Round, State, Sums
    from edge_runtime.messages import UpdateMeta


class FedBuff(FedAvg):
    """Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1.

    The change is ``sum(s_i * delta_i) / n`` of the ``n`` updates in the buffer, ``s = (1 + staleness) ** -exponent``;
    the paper's is ``staleness_exponent = 0.5``, the plan's default. Stale updates shorten the step, where FedAvg's
    weighted mean would only shift it. Goes with ``mode = "buffered"``, and works with any.
    """

    name: ClassVar[str] = "fedbuff"
    capped: ClassVar[bool] = False

    def weight(self, meta: UpdateMeta, staleness: int) -> float:  # noqa: ARG002
        """``s``, whatever the samples."""
        return self.damping(staleness)

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The mean over the buffer."""
        change = round_.total("delta", lambda update: update.weight)
        change /= len(round_.contributions)
        return change, state
