"""FedAvgM: FedAvg with momentum on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.fedavg import FedAvg
from coordinator.plugins import check_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Totals, Vector


class FedAvgM(FedAvg):
    """Hsu et al. 2019, section 4.3: ``v = momentum * v + mean(delta)``, ``new = base + lr * v``.

    Options: those of FedAvg and ``momentum`` (0.9); 0 is FedAvg.
    """

    name: ClassVar[str] = "fedavgm"

    def __init__(self, *, momentum: float = 0.9, lr: float = 1.0, staleness_exponent: float = 0.5) -> None:
        super().__init__(lr=lr, staleness_exponent=staleness_exponent)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, it must be at least 0 and below 1")
        self.momentum = momentum

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> FedAvgM:
        return cls(**check_options(options, {"momentum": 0.9, "lr": 1.0, "staleness_exponent": 0.5}))

    def init(self, size: int) -> State:
        import numpy as np

        return {"velocity": np.zeros(size, np.float64)}

    def apply(self, base: Vector, totals: Totals, weight_sum: float, state: State) -> tuple[Vector, State]:
        velocity = self.momentum * state["velocity"] + totals["delta"] / weight_sum
        new, _ = super().apply(base, {"delta": velocity}, 1.0, {})
        return new, {"velocity": velocity}
