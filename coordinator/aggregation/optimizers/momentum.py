"""Momentum on the server (FedAvgM)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.optimizers.sgd import SMALLEST, Sgd, step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Sums, Vector


class Momentum(Sgd):
    """Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", section 4.3.

    ``v = momentum * v + change``, ``new = base + lr * v``. Options: ``momentum`` (0.9; 0 is ``sgd``) and ``lr`` (1.0).
    """

    name: ClassVar[str] = "momentum"
    defaults: ClassVar[Mapping[str, float]] = {"momentum": 0.9, "lr": 1.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"momentum": (0.0, 0.9999), "lr": (SMALLEST, math.inf)}

    def init(self, size: int) -> State:
        """The velocity, float64 ``[size]``."""
        import numpy as np

        return {"velocity": np.zeros(size, np.float64)}

    def apply(self, base: Vector, change: Sums, state: State) -> tuple[Vector, State, dict[str, float]]:
        """One step along the velocity."""
        velocity = self.options["momentum"] * state["velocity"] + change
        return step(base, velocity, self.options["lr"]), {"velocity": velocity}, {}
