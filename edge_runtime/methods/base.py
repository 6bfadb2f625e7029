"""The client side of a federated method: what a device does differently from plain FedAvg.

A method sees the model as one float32 vector in the order of :meth:`edge_runtime.bundle.Bundle.layout`. Everything that
must survive between rounds goes through ``memory``, a dictionary of vectors that the runtime keeps on the device, per
run; a method object itself lives for one job only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from edge_runtime.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout
    from edge_runtime.training.randomness import Stream

    Vector: TypeAlias = NDArray[np.float32]
    GradientHook: TypeAlias = Callable[[Vector, Vector], Vector]
    Memory: TypeAlias = dict[str, Vector]


class ClientMethod:
    """FedAvg, and the base of every other method; override what differs.

    Attributes:
        name: the name jobs use.
        defaults: the options (hyper-parameters) and their defaults; other options are refused.
        neutral: options with which the method does exactly what FedAvg does.
        channels: names of the vectors that :meth:`on_finish` gives, each in layout order.
        variant: graph variant of the bundle with this method's objective, used where the job names none.
    """

    name: ClassVar[str] = "fedavg"
    defaults: ClassVar[Mapping[str, float]] = {}
    neutral: ClassVar[Mapping[str, float]] = {}
    channels: ClassVar[tuple[str, ...]] = ("delta",)
    variant: ClassVar[str | None] = None

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        """Takes the job's options.

        Raises:
            TrainingError: an option that the method does not have, or that is not finite.
        """
        given = dict(options or {})
        for key, value in given.items():
            if key not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise TrainingError(f"method {self.name!r} has no option {key!r}; it has {known}")
            if not math.isfinite(value):
                raise TrainingError(f"option {key!r} of method {self.name!r} is {value}; give a finite number")
        self.options: dict[str, float] = {**self.defaults, **given}

    def personal(self, layout: Layout) -> frozenset[str]:  # noqa: ARG002
        """Tensors that never leave the device.

        Their values stay on the device from round to round; in every channel their entries are what they would be had
        these tensors not changed at all (zero in ``delta``), so the layout is the same on both ends.
        """
        return frozenset()

    def on_receive(self, received: Vector, layout: Layout, memory: Memory) -> Vector:  # noqa: ARG002
        """The weights to start from, float32 ``[layout.size]``; ``received`` is read-only, with personal tensors."""
        return received

    def gradient_hook(self) -> GradientHook | None:
        """None, or a function of gradient and weights (both ``[layout.size]``) that gives the gradient to apply.

        It may change the gradient in place. Entries of buffers are zero and are not applied. With a hook, training
        runs on the graphs ``gradients`` and ``update``; without, on the faster ``train``.
        """
        return None

    def sampler(self, count: int, rng: Stream) -> NDArray[np.integer[Any]]:
        """Order in which one epoch visits ``count`` samples; by default each once, shuffled."""
        return rng.permutation(count)

    def on_finish(self, received: Vector, trained: Vector, layout: Layout, memory: Memory) -> dict[str, Vector]:  # noqa: ARG002
        """The vectors to send, by channel. In ``trained``, personal tensors hold what was received."""
        return {"delta": trained - received}
