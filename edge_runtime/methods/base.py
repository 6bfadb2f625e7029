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
    from edge_runtime.messages import Role
    from edge_runtime.training.randomness import Stream

    Vector: TypeAlias = NDArray[np.float32]
    GradientAt: TypeAlias = Callable[[Vector], Vector]
    GradientHook: TypeAlias = Callable[[Vector, Vector, GradientAt], Vector]
    Memory: TypeAlias = dict[str, Vector]


class ClientMethod:
    """FedAvg, and the base of every other method; override what differs.

    Attributes:
        name: the name jobs use.
        defaults: the options (hyper-parameters) and their defaults; other options are refused.
        neutral: options with which the method does exactly what FedAvg does.
        channels: names of the vectors that :meth:`on_finish` gives, each in layout order.
        roles: names of the vectors that are sent in roles other than trainer.
        down_channels: names of what the server sends; beside the model see :meth:`on_channels`.
        variant: graph variant of the bundle with this method's objective, used where the job names none.
    """

    name: ClassVar[str] = "fedavg"
    defaults: ClassVar[Mapping[str, float]] = {}
    neutral: ClassVar[Mapping[str, float]] = {}
    channels: ClassVar[tuple[str, ...]] = ("delta",)
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {}
    down_channels: ClassVar[tuple[str, ...]] = ("model",)
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

    def on_channels(self, channels: Mapping[str, Vector]) -> None:
        """Takes what came beside the model, float32 ``[layout.size]`` by channel; called before all else."""

    def on_receive(self, received: Vector, layout: Layout, memory: Memory) -> Vector:  # noqa: ARG002
        """The weights to start from, float32 ``[layout.size]``; ``received`` is read-only, with personal tensors."""
        return received

    def gradient_hook(self) -> GradientHook | None:
        """None, or a function that gives the gradient to apply, float32 ``[layout.size]``.

        It gets the batch's gradient, which it may change in place, the weights, and a function that gives the gradient
        of the same batch at other weights, in new memory, at the cost of another forward and backward pass. Entries of
        buffers are zero and are not applied. With a hook, training runs on the graphs ``gradients`` and ``update``;
        without, on the faster ``train``.
        """
        return None

    def sampler(self, count: int, rng: Stream) -> NDArray[np.integer[Any]]:
        """Order in which one epoch visits ``count`` samples; by default each once, shuffled."""
        return rng.permutation(count)

    def on_finish(self, received: Vector, trained: Vector, layout: Layout, memory: Memory) -> dict[str, Vector]:  # noqa: ARG002
        """The vectors to send, by channel. In ``trained``, personal tensors hold what was received."""
        return {"delta": trained - received}

    def anchor(self, gradient: Vector, layout: Layout, memory: Memory) -> dict[str, Vector]:  # noqa: ARG002
        """The vectors to send in the role "anchor", by channel.

        ``gradient`` is that of the received model, the mean over all samples; entries of buffers are zero.

        Raises:
            TrainingError: the method has no such role.
        """
        raise TrainingError(f"method {self.name!r} has no role 'anchor'; only trainers can be asked")
