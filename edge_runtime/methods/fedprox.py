"""FedProx: a proximal term keeps local weights near the received ones.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2: each step minimises
``F(w) + mu / 2 * |w - w_received| ** 2``, so ``mu * (w - w_received)`` is added to the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edge_runtime.errors import TrainingError
from edge_runtime.methods.base import ClientMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_runtime.compression.base import Layout
    from edge_runtime.methods.base import GradientAt, GradientHook, Memory, Vector


class FedProx(ClientMethod):
    """Option ``mu``: strength of the proximal term; 0 is FedAvg."""

    name: ClassVar[str] = "fedprox"
    defaults: ClassVar[Mapping[str, float]] = {"mu": 0.01}
    neutral: ClassVar[Mapping[str, float]] = {"mu": 0.0}

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        """Raises TrainingError for a negative ``mu``."""
        super().__init__(options)
        if self.options["mu"] < 0:
            raise TrainingError(f"option 'mu' of method 'fedprox' is {self.options['mu']}; give 0 or more")
        self._received: Vector | None = None

    def on_receive(self, received: Vector, layout: Layout, memory: Memory) -> Vector:  # noqa: ARG002
        """Remembers the received weights for the proximal term."""
        self._received = received
        return received

    def gradient_hook(self) -> GradientHook | None:
        """Adds ``mu * (w - w_received)``."""
        return self._pull if self.options["mu"] > 0 else None

    def _pull(self, gradient: Vector, weights: Vector, _gradient_at: GradientAt) -> Vector:
        assert self._received is not None
        pull = weights - self._received
        pull *= self.options["mu"]
        gradient += pull
        return gradient
