"""FedAMD: anchors send a gradient over all their data, miners take steps that lean on the anchors' mean.

Wu et al., "Anchor Sampling for Federated Learning with Partial Client Participation", ICML 2023, algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edge_runtime.methods.base import ClientMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_runtime.compression.base import Layout
    from edge_runtime.messages import Role
    from edge_runtime.methods.base import GradientAt, GradientHook, Memory, Vector


class FedAmd(ClientMethod):
    """A miner starts from ``g = v``, the anchors' mean, and corrects it with every batch ``B`` after the first.

    ``g += grad f(x; B) - grad f(x_before; B)``, then a step along ``g``: two gradients a batch. While there is no
    anchor ``v`` is zero everywhere, and a miner takes the plain steps of FedAvg. An anchor takes no step: it sends the
    gradient at the received model, which is one pass and no more.
    """

    name: ClassVar[str] = "fedamd"
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {"anchor": ("anchor",)}
    down_channels: ClassVar[tuple[str, ...]] = ("model", "anchor")

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        """Takes no options."""
        super().__init__(options)
        self._direction: Vector | None = None
        self._before: Vector | None = None

    def on_channels(self, channels: Mapping[str, Vector]) -> None:
        """Starts from the anchors' mean, if there is one."""
        anchor = channels["anchor"]
        self._direction = anchor.copy() if anchor.any() else None

    def gradient_hook(self) -> GradientHook:
        """Gives ``g``."""
        return self._lean

    def anchor(self, gradient: Vector, layout: Layout, memory: Memory) -> dict[str, Vector]:  # noqa: ARG002
        """The gradient itself."""
        return {"anchor": gradient}

    def _lean(self, gradient: Vector, weights: Vector, gradient_at: GradientAt) -> Vector:
        if self._direction is None:
            return gradient
        if self._before is not None:
            self._direction += gradient
            self._direction -= gradient_at(self._before)
        self._before = weights.copy()
        return self._direction
