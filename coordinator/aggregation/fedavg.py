"""FedAvg: the weighted mean of the client updates, added to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.plugins import check_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Totals, Vector
    from edge_runtime.compression import Update
    from edge_runtime.messages import UpdateMeta


class FedAvg:
    """McMahan et al. 2017, algorithm 1, with polynomial staleness weights (Xie et al. 2019, "poly", section 5).

    ``new = base + lr * sum(w_i * delta_i) / sum(w_i)`` with ``w_i = samples_i * (1 + staleness_i) ** -exponent``, in
    float64 and rounded to float32 once.

    Options: ``lr``, the server learning rate (1.0); ``staleness_exponent`` is handed over from the plan.
    """

    name: ClassVar[str] = "fedavg"
    channels: ClassVar[tuple[str, ...]] = ("delta",)

    def __init__(self, *, lr: float = 1.0, staleness_exponent: float = 0.5) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}, it must be above 0")
        self.lr = lr
        self.staleness_exponent = staleness_exponent

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> FedAvg:
        return cls(**check_options(options, {"lr": 1.0, "staleness_exponent": 0.5}))

    def init(self, size: int) -> State:  # noqa: ARG002
        return {}

    def down(self, model: Vector, state: State) -> dict[str, Vector]:  # noqa: ARG002
        return {"model": model}

    def accept(self, meta: UpdateMeta, staleness: int) -> str:  # noqa: ARG002
        return ""

    def weight(self, meta: UpdateMeta, staleness: int) -> float:
        return float(meta.samples * (1.0 + staleness) ** -self.staleness_exponent)

    def aggregate(self, totals: Totals, update: Mapping[str, Update], weight: float) -> None:
        update["delta"].add_to(totals["delta"], weight)

    def apply(self, base: Vector, totals: Totals, weight_sum: float, state: State) -> tuple[Vector, State]:
        import numpy as np

        return (base + totals["delta"] * (self.lr / weight_sum)).astype(np.float32), state
