"""FedHyper-G: the server's learning rate follows whether rounds agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.optimizers.sgd import SMALLEST, Sgd, step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Sums, Vector


class FedHyperG(Sgd):
    """Wang et al., "FedHyper", ICLR 2024, the global scheduler.

    ``a = clip(a + rate * <D, D_before>, least, most)`` from ``a = 1``, and ``new = base + a * D``. The inner product
    depends on the scale of the model's changes; with ``normalised = 1`` it is the cosine of the two, in [-1, 1].
    Options: ``rate`` (1.0; 0 is ``sgd``), ``least`` (0.2), ``most`` (5.0), ``normalised`` (0).
    """

    name: ClassVar[str] = "fedhyper_g"
    defaults: ClassVar[Mapping[str, float]] = {"rate": 1.0, "least": 0.2, "most": 5.0, "normalised": 0.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "rate": (0.0, math.inf),
        "least": (SMALLEST, 1.0),
        "most": (1.0, math.inf),
        "normalised": (0.0, 1.0),
    }

    def init(self, size: int) -> State:
        """The change before, float64 ``[size]``, and the learning rate, float64 ``[1]``."""
        import numpy as np

        return {"before": np.zeros(size, np.float64), "lr": np.ones(1, np.float64)}

    def apply(self, base: Vector, change: Sums, state: State) -> tuple[Vector, State, dict[str, float]]:
        """One step."""
        import numpy as np

        options = self.options
        moved = options["rate"] * agreement(change, state["before"], normalised=options["normalised"] > 0)
        lr = min(max(float(state["lr"][0]) + moved, options["least"]), options["most"])
        return step(base, change, lr), {"before": change, "lr": np.full(1, lr)}, {}


def agreement(change: Sums, before: Sums, *, normalised: bool) -> float:
    """The inner product of two changes, or its cosine; 0 where there is no direction."""
    import numpy as np

    # Summed by NumPy in pairs and not by BLAS, whose order of summation differs between machines.
    with np.errstate(over="ignore"):
        product = float(np.sum(change * before))
        if not normalised:
            return product if math.isfinite(product) else 0.0
        norms = math.sqrt(float(np.sum(change * change))) * math.sqrt(float(np.sum(before * before)))
    return product / norms if 0.0 < norms < math.inf else 0.0
