"""The codec seam: how a vector of numbers becomes bytes and returns.

A :class:`Codec` is named, configured by plain values and pure: state that must survive between rounds (a warm start)
goes in and out, nothing hides in the object. :mod:`edge_runtime.compression.transforms` prepare the vector before
(clipping, momentum correction, error feedback) and learn afterwards what was really sent;
:mod:`edge_runtime.compression.pipeline` chains them. One codec, one file; :mod:`edge_runtime.compression.registry`
finds them by name and by entry point.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import msgspec

from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    Vector: TypeAlias = NDArray[np.float32]
    State: TypeAlias = dict[str, NDArray[Any]]

Value: TypeAlias = bool | int | float | str


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

    @property
    def fingerprint(self) -> bytes:
        """Four bytes that differ for another set of names, shapes or buffers."""
        text = msgspec.json.encode([self.names, self.shapes, sorted(self.buffers)])
        return hashlib.sha256(text).digest()[:4]

    def spans(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape, first element and end of each tensor."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = start + math.prod(shape)
            yield name, shape, start, end
            start = end

    def only(self, *, buffers: bool) -> Layout:
        """The buffers alone, or all tensors but the buffers (as a layout without any)."""
        chosen = [(name, shape) for name, shape, _, _ in self.spans() if (name in self.buffers) == buffers]
        return Layout(tuple(name for name, _ in chosen), tuple(shape for _, shape in chosen))

    def take(self, vector: Vector, *, buffers: bool) -> Vector:
        """The buffers of a vector ``[size]``, or all else, in new memory."""
        import numpy as np

        parts = [vector[start:end] for name, _, start, end in self.spans() if (name in self.buffers) == buffers]
        return np.concatenate([np.empty(0, vector.dtype), *parts])

    def join(self, trained: Vector, buffers: Vector) -> Vector:
        """The inverse of both :meth:`take`, in new memory."""
        import numpy as np

        vector = np.empty(self.size, np.float32)
        at = {False: 0, True: 0}
        for name, _, start, end in self.spans():
            kind = name in self.buffers
            part = buffers if kind else trained
            vector[start:end] = part[at[kind] : at[kind] + end - start]
            at[kind] += end - start
        return vector

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> Vector:
        """Vector float32 ``[size]`` of the tensors in layout order.

        Raises:
            CodecError: a tensor is missing or has another shape.
        """
        import numpy as np

        vector = np.empty(self.size, np.float32)
        for name, shape, start, end in self.spans():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape:
                raise CodecError(f"tensor {name!r} has shape {getattr(tensor, 'shape', None)}, expected {shape}")
            vector[start:end] = tensor.reshape(-1)
        return vector

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Views of ``vector`` (``[size]``) by tensor name.

        Raises:
            CodecError: the vector has another size.
        """
        if vector.shape != (self.size,):
            raise CodecError(f"vector has shape {vector.shape}, the layout needs ({self.size},)")
        return {name: vector[start:end].reshape(shape) for name, shape, start, end in self.spans()}


class Update:
    """A decoded vector: dense, or sparse as unique positions with their values.

    Args:
        values: float32 ``[size]``, or ``[k]`` of a sparse update.
        indices: int64 ``[k]``, unique, below ``size``; None: dense.
        size: of the whole vector.
    """

    __slots__ = ("indices", "size", "values")

    def __init__(self, values: Vector, indices: NDArray[np.int64] | None = None, size: int | None = None) -> None:
        self.values = values
        self.indices = indices
        self.size = len(values) if size is None else size

    def vector(self) -> Vector:
        """Float32 ``[size]``; of a dense update the values themselves, maybe read-only."""
        import numpy as np

        if self.indices is None:
            return self.values
        vector = np.zeros(self.size, np.float32)
        vector[self.indices] = self.values
        return vector

    def add_to(self, total: NDArray[np.float64], weight: float) -> None:
        """``total += weight * update`` in float64; what a sparse update does not hold is not touched."""
        import numpy as np

        if self.indices is not None:
            total[self.indices] += np.multiply(self.values, weight, dtype=np.float64)
            return
        block = 1 << 16  # blocks stay in the cache, and no temporary of the model's size is made
        for start in range(0, self.size, block):
            part = self.values[start : start + block]
            total[start : start + block] += np.multiply(part, weight, dtype=np.float64)

    def subtracted_from(self, vector: Vector) -> Vector:
        """``vector - update``, float32 ``[size]``, in new memory."""
        if self.indices is None:
            rest: Vector = vector - self.values
            return rest
        rest = vector.copy()
        rest[self.indices] -= self.values
        return rest

    def norm(self) -> float:
        """L2 norm."""
        import numpy as np

        return float(np.sqrt(np.square(self.values, dtype=np.float64).sum()))


class Request(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What is asked of one encoding.

    Attributes:
        budget_bytes: of the payload; None: the codec's own choice.
        seed: of stochastic codecs.
        reference: the model that the values are relative to, float32 of their size, which the receiver holds bit for
            bit; a codec may predict from it. None: there is none.
    """

    budget_bytes: int | None = None
    seed: int = 0
    reference: Vector | None = None


class Encoded(NamedTuple):
    """The payload, exactly what it decodes to, and the codec's state for the next time."""

    payload: bytes | memoryview
    update: Update
    state: State


class Codec:
    """Base of all codecs; an instance is immutable and may be shared between threads.

    A lossy codec never sees buffers: they travel dense beside its payload.

    Attributes:
        name: the name jobs and plans use.
        number: stands for the name in the container; 0 for codecs of other packages, which travel by name.
        lossless: every float32 comes back bit for bit.
        keeps_budget: whether the payload keeps to ``Request.budget_bytes``; others take what they take.
        feedback: whether what was not sent is kept and added the next time, unless the options say otherwise.
        alignment: 1, 2 or 4: the payload begins at a multiple of this, so that arrays can be viewed in place.
        defaults: the options and their defaults; an option has the type of its default.
    """

    name: ClassVar[str]
    number: ClassVar[int] = 0
    lossless: ClassVar[bool] = False
    keeps_budget: ClassVar[bool] = False
    feedback: ClassVar[bool] = True
    alignment: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Value]] = {}

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options.

        Raises:
            CodecError: an option that the codec does not have, or of another type or range.
        """
        self.options: dict[str, Value] = check_options(f"codec {self.name!r}", options or {}, self.defaults)

    def uses_feedback(self) -> bool:
        """Whether error feedback is on where the user does not say: ``feedback``, unless an option decides."""
        return self.feedback

    def init(self, layout: Layout) -> State:  # noqa: ARG002
        """State before the first encoding; empty for most codecs. Arrays, since it is stored on the device."""
        return {}

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """Payload for ``values``, finite float32 ``[layout.size]``.

        Raises:
            CodecError: it cannot be encoded, or the budget is below what the codec needs at least.
        """
        raise NotImplementedError

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """What the payload holds; bit for bit the ``update`` that ``encode`` gave, on every machine.

        Allocates no more than in proportion to ``layout.size``, whatever the payload claims.

        Raises:
            CodecError: the payload is damaged or does not fit the layout. (ValueError, TypeError, LookupError,
                ArithmeticError and MemoryError become one.)
        """
        raise NotImplementedError

    def decode_against(self, payload: memoryview, layout: Layout, reference: Vector | None) -> Update:  # noqa: ARG002
        """Like :meth:`decode`, for codecs that predict from ``Request.reference``, which must be the encoder's."""
        return self.decode(payload, layout)

    def predicts(self, payload: memoryview, layout: Layout) -> bool:  # noqa: ARG002
        """Whether decoding this payload needs the reference that it was encoded with; raises like :meth:`decode`."""
        return False


def check_options(owner: str, given: Mapping[str, Value], defaults: Mapping[str, Value]) -> dict[str, Value]:
    """The defaults with what was given put in.

    Raises:
        CodecError: an unknown name, another type than the default's, or a number that is not finite.
    """
    options = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise CodecError(f"{owner} has no option {key!r}; it has {', '.join(sorted(defaults)) or 'none'}")
        default = defaults[key]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)  # noqa: PLW2901 - TOML writes 1 for 1.0
        if type(value) is not type(default):
            raise CodecError(f"{owner}: option {key!r} is {value!r}, expected {_TYPE_NAMES[type(default)]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise CodecError(f"{owner}: option {key!r} is {value}; give a finite number")
        options[key] = value
    return options


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
