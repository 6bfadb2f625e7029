"""FedHyper-SL: the server sets the learning rate of the devices by whether rounds agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.optimizers.fedhyper_g import agreement
from coordinator.aggregation.optimizers.sgd import SMALLEST, Sgd, step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Sums, Vector


class FedHyperSL(Sgd):
    """Wang et al., "FedHyper", ICLR 2024, the scheduler that runs on the server and sets local learning rates.

    ``lr = clip(client_lr * (1 + rate * sum(<D_s, D_{s-1}>)), least, most)`` for the devices' next jobs; the model
    takes the change as it is. The released code sets the devices' rate anew at the top of every round, so that there
    this does nothing. Options: ``client_lr`` (``training.hyper.lr`` of the plan), ``rate`` (1.0; 0 leaves ``client_lr``
    as it is), ``least`` (0.001), ``most`` (0.1), ``normalised`` (0; 1 takes cosines in place of inner products).
    """

    name: ClassVar[str] = "fedhyper_sl"
    defaults: ClassVar[Mapping[str, float]] = {
        "client_lr": 0.0,
        "rate": 1.0,
        "least": 0.001,
        "most": 0.1,
        "normalised": 0.0,
    }
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "rate": (0.0, math.inf),
        "least": (SMALLEST, math.inf),
        "most": (SMALLEST, math.inf),
        "normalised": (0.0, 1.0),
    }

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        """Also refuses to go without ``client_lr``, and one that is not within its bounds."""
        super().__init__(options)
        rate, low, high = (self.options[key] for key in ("client_lr", "least", "most"))
        if not rate > 0:
            raise ValueError("client_lr is missing; give it, or lr in [training.hyper] of the plan")
        if not low <= rate <= high:
            raise ValueError(f"client_lr is {rate:g}, outside of least = {low:g} to most = {high:g}; change these")

    def init(self, size: int) -> State:
        """The change before, float64 ``[size]``, and the sum of inner products, float64 ``[1]``."""
        import numpy as np

        return {"before": np.zeros(size, np.float64), "sum": np.zeros(1, np.float64)}

    def apply(self, base: Vector, change: Sums, state: State) -> tuple[Vector, State, dict[str, float]]:
        """One step, and ``lr`` for the next jobs."""
        import numpy as np

        options = self.options
        total = float(state["sum"][0])
        total += options["rate"] * agreement(change, state["before"], normalised=options["normalised"] > 0)
        lr = min(max(options["client_lr"] * (1.0 + total), options["least"]), options["most"])
        return step(base, change, 1.0), {"before": change, "sum": np.full(1, total)}, {"lr": lr}
