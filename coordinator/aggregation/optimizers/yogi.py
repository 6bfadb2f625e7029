"""Yogi on the server (FedYogi)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.optimizers.adam import Adam

if TYPE_CHECKING:
    from coordinator.aggregation.base import Sums


class Yogi(Adam):
    """Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.

    As :class:`~coordinator.aggregation.optimizers.adam.Adam`, with ``v = v - (1 - beta2) * D**2 * sign(v - D**2)``:
    the second moment changes by at most the newest square, so it forgets slowly.
    """

    name: ClassVar[str] = "yogi"

    def square(self, before: Sums, change: Sums) -> Sums:
        """The next second moment, float64 ``[size]``."""
        import numpy as np

        newest = change * change
        after: Sums = before - (1.0 - self.options["beta2"]) * newest * np.sign(before - newest)
        return after
