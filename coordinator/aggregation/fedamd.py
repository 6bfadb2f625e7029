"""FedAMD: a table of anchors' gradients, their mean sent with the model, and the mean of the miners' updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation import tables
from coordinator.aggregation.base import itself
from coordinator.aggregation.fedavg import FedAvg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import Round, State, Sums, Vector
    from edge_runtime.messages import Role, UpdateMeta


class FedAmd(FedAvg):
    """Wu et al., "Anchor Sampling for Federated Learning with Partial Client Participation", ICML 2023, algorithm 1.

    An anchor sends the gradient of the received model over its data, which replaces its row ``v_i``; with the next
    model goes ``v``, the mean of the rows there are, zero while there is none. Released code asks every device for its
    row before the first round; here rows come as devices are asked to be anchors. The change is the mean of the
    miners' updates, less for late ones as in FedAvg, all devices alike as in ``v``; zero in a round of anchors only.
    Devices run the client method of the same name.
    """

    name: ClassVar[str] = "fedamd"
    capped: ClassVar[bool] = False
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {"anchor": ("anchor",)}
    down_channels: ClassVar[tuple[str, ...]] = ("model", "anchor")
    table: ClassVar[bool] = True

    def init(self, size: int) -> State:
        """The sum of no rows."""
        return tables.empty(size)

    def down(self, model: Vector, state: State) -> dict[str, Vector]:
        """The model and ``v``."""
        import numpy as np

        anchor = tables.mean(state, max(1, int(state[tables.ROWS][0])))
        return {"model": model, "anchor": anchor.astype(np.float32)}

    def weight(self, meta: UpdateMeta, staleness: int) -> float:  # noqa: ARG002
        """All devices alike, less for late updates."""
        return self.damping(staleness)

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """New rows of anchors, and the mean of the miners."""
        anchors = tables.newest(entry for entry in round_.contributions if entry.role == "anchor")
        vectors = (update.vector() for update in round_.each("anchor", anchors, itself))
        state = tables.replace(round_, state, zip((entry.update.device for entry in anchors), vectors, strict=True))
        change = round_.total("delta", lambda update: update.weight)
        weights = [entry.weight for entry in round_.contributions if entry.role == "trainer"]
        if weights:
            change /= sum(weights)
        return change, state
