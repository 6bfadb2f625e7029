"""The codec seam: how a vector of numbers becomes bytes and returns.

A codec is a chain of stages. Every stage turns a :class:`Packet` (named arrays) into another and back; state that
must survive between rounds (error feedback, dither counters) goes in and out explicitly, nothing hides in a stage.
One stage, one file; :mod:`edge_runtime.compression.registry` finds them by name and by entry point.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np  # noqa: TC004 - annotations are never evaluated, and numpy must not be imported here


class Layout(msgspec.Struct, frozen=True):
    """Names and shapes of the tensors that are laid end to end in one float32 vector, in this order.

    ``buffers`` names those that training does not optimise but observes, as running means and variances.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    buffers: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Number of elements of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Vector float32 ``[size]`` of the tensors in layout order.

        Raises:
            CodecError: a tensor is missing or has another shape.
        """
        import numpy as np

        vector = np.empty(self.size, np.float32)
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape:
                raise CodecError(f"tensor {name!r} has shape {getattr(tensor, 'shape', None)}, expected {shape}")
            end = start + math.prod(shape)
            vector[start:end] = tensor.reshape(-1)
            start = end
        return vector

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Views of ``vector`` (float32 ``[size]``) by tensor name.

        Raises:
            CodecError: the vector has another size.
        """
        if vector.shape != (self.size,):
            raise CodecError(f"vector has shape {vector.shape}, the layout needs ({self.size},)")
        tensors: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = start + math.prod(shape)
            tensors[name] = vector[start:end].reshape(shape)
            start = end
        return tensors


class Packet(msgspec.Struct, eq=False):  # a dataclass would import inspect and ast into the idle agent
    """Named arrays between two stages. A chain starts and ends with one float32 array ``values`` of ``[size]``."""

    arrays: dict[str, np.ndarray] = {}


class Stage(Protocol):
    """One step of a codec chain; instances are stateless and may be shared between threads."""

    name: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """Parameters written into the frame, so that ``from_config`` rebuilds a stage that decodes it."""
        ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Stage:
        """The stage for a received configuration; raises CodecError if it is not usable."""
        ...

    def encode(self, packet: Packet, layout: Layout, state: bytes) -> tuple[Packet, bytes]:
        """The packet encoded, and the state for the next round (``b""`` at the start and for stateless stages)."""
        ...

    def decode(self, packet: Packet, layout: Layout) -> Packet:
        """The inverse; allocates no more than the layout's size allows; raises CodecError for wrong input."""
        ...
