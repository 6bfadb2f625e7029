"""Adam on the server (FedAdam)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.optimizers.sgd import SMALLEST, Sgd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Sums, Vector


class Adam(Sgd):
    """Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2, without bias correction as there.

    ``m = beta1 * m + (1 - beta1) * D``, ``v = beta2 * v + (1 - beta2) * D**2``, ``new = base + lr * m / (sqrt(v) +
    tau)``, from ``m = 0`` and ``v = tau**2``. Options: ``lr`` (0.01), ``tau`` (0.001), ``beta1`` (0.9), ``beta2``
    (0.99). With ``beta1 = 0``, ``beta2 = 1`` and ``lr = 2 * tau`` it is ``sgd``.
    """

    name: ClassVar[str] = "adam"
    defaults: ClassVar[Mapping[str, float]] = {"lr": 0.01, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "lr": (SMALLEST, math.inf),
        "tau": (SMALLEST, math.inf),
        "beta1": (0.0, 0.9999),
        "beta2": (0.0, 1.0),
    }

    def init(self, size: int) -> State:
        """Both moments, float64 ``[size]``."""
        import numpy as np

        return {"mean": np.zeros(size, np.float64), "square": np.full(size, self.options["tau"] ** 2, np.float64)}

    def apply(self, base: Vector, change: Sums, state: State) -> tuple[Vector, State, dict[str, float]]:
        """One step."""
        import numpy as np

        options = self.options
        mean = options["beta1"] * state["mean"] + (1.0 - options["beta1"]) * change
        square = self.square(state["square"], change)
        with np.errstate(over="ignore"):  # what leaves the range of float32 is refused with the model
            new = (base + options["lr"] * mean / (np.sqrt(square) + options["tau"])).astype(np.float32)
        return new, {"mean": mean, "square": square}, {}

    def square(self, before: Sums, change: Sums) -> Sums:
        """The next second moment, float64 ``[size]``."""
        beta2 = self.options["beta2"]
        after: Sums = beta2 * before + (1.0 - beta2) * change * change
        return after
