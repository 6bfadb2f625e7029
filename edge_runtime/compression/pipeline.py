"""Encoding and decoding of whole updates and models: transforms, then a codec, then the container.

Buffers (running statistics, counters) do not go through a lossy codec: they travel dense beside it, as float16 where
that holds their changes and as float32 where it does not, and error feedback covers the rounding too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edge_runtime.compression.base import Layout, Request, Update, Value
from edge_runtime.compression.container import Header, header_bytes, pack, unpack
from edge_runtime.compression.registry import codec_class
from edge_runtime.compression.transforms import OPTIONS, Transform, chain
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Codec, State, Vector

MODEL_CHANNEL = "model"
_F16, _F32 = 0, 1


class CodecSpec(msgspec.Struct, frozen=True):
    """A codec by name, and its options with those of the transforms, as plain values."""

    name: str = "raw"
    options: dict[str, Value] = {}


class EncodedUpdate(NamedTuple):
    """The container, what it decodes to by channel, and the state for the next time."""

    data: bytes
    updates: dict[str, Update]
    state: State


def check_spec(spec: CodecSpec) -> None:
    """Raises CodecError if the codec or one of its options is unknown or unusable."""
    _build(spec)


def encode(
    spec: CodecSpec,
    vectors: Mapping[str, Vector],
    layouts: Mapping[str, Layout],
    state: State | None = None,
    *,
    budget_bytes: int | None = None,
    seed: int = 0,
    base_version: int = 0,
    tag: int = 0,
    reference: Vector | None = None,
) -> EncodedUpdate:
    """Container of the vectors (float32 ``[layout.size]`` by channel).

    Args:
        spec: codec and options.
        vectors: by channel.
        layouts: of the channels.
        state: what the previous call gave; None at the start.
        budget_bytes: most bytes of the container; None: the codec's own choice.
        seed: of stochastic codecs.
        base_version: model version that the values are relative to.
        tag: of the update (:func:`~edge_runtime.compression.container.update_tag`), 0 for a model.
        reference: model of ``base_version``, as the receiver holds it bit for bit, for channels of its size; None: the
            receiver has none.

    Raises:
        CodecError: unknown codec or option, other channels than ``layouts``, a wrong size, a value that is not finite,
            a budget that the codec cannot keep, or a state that does not fit.
    """
    codec, transforms = _build(spec)
    if sorted(vectors) != sorted(layouts):
        raise CodecError(f"channels {sorted(vectors)} given, expected {sorted(layouts)}")
    header = Header(codec=codec.number or codec.name, tag=tag, base_version=base_version)
    left = None if budget_bytes is None else budget_bytes - header_bytes(header, len(layouts))
    total = sum(layout.size for layout in layouts.values())
    sections: list[list[bytes | memoryview]] = []
    updates: dict[str, Update] = {}
    new_state: State = {}
    for name in sorted(vectors):
        layout, vector = layouts[name], vectors[name]
        if vector.shape != (layout.size,) or vector.dtype.str not in ("<f4", "=f4"):
            raise CodecError(f"channel {name!r} is {vector.dtype} {vector.shape}, expected float32 ({layout.size},)")
        check_finite(f"channel {name!r}", vector, layout)
        share = None if left is None else left * layout.size // max(1, total)
        channel = _Channel(name, layout, codec, transforms)
        request = Request(budget_bytes=share, seed=seed, reference=reference)
        section, updates[name] = channel.encode(vector, state or {}, new_state, request)
        sections.append(section)
    data = pack(header, layouts, sections, codec.alignment)
    if budget_bytes is not None and len(data) > budget_bytes:
        raise CodecError(
            f"{len(data)} bytes with codec {spec.name!r}, but {budget_bytes} are allowed; choose a stronger codec or a "
            "larger budget"
        )
    return EncodedUpdate(data, updates, new_state)


def decode(
    data: bytes | memoryview,
    layouts: Mapping[str, Layout],
    *,
    base_version: int | None = None,
    tag: int | None = None,
    max_norm: float = math.inf,
    reference: Vector | None = None,
) -> dict[str, Update]:
    """Updates by channel, possibly views of ``data``.

    Args:
        data: a container.
        layouts: of the channels, from the receiver's own manifest.
        base_version: refuse values relative to another model version; None: any.
        tag: refuse another update; None: any.
        max_norm: refuse a larger L2 norm of a channel.
        reference: what ``encode`` was given.

    Raises:
        CodecError: damaged, hostile, of an unknown codec, made for other tensors, another version or another update,
            or a value that is not finite.
    """
    header, sections = unpack(data, layouts)
    if base_version is not None and header.base_version != base_version:
        raise CodecError(f"relative to model version {header.base_version}, expected {base_version}")
    if tag is not None and header.tag != tag:
        raise CodecError("the bytes are those of another update")
    if header.codec == "":
        raise CodecError("the codec has no name")
    codec = codec_class(header.codec)()
    view = memoryview(data)
    updates = {}
    for name, (start, end) in sections.items():
        channel = _Channel(name, layouts[name], codec, [])
        try:
            update = channel.decode(view[start:end], reference)
        except CodecError as error:
            raise CodecError(f"channel {name!r}: {error}") from error
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            raise CodecError(f"channel {name!r} cannot be decoded: {error}") from error
        _check(name, update, layouts[name], max_norm)
        updates[name] = update
    return updates


def keeps_residual(spec: CodecSpec) -> bool:
    """Whether what is not sent is kept and added the next time; raises CodecError as :func:`check_spec` does."""
    return any(transform.name == "feedback" for transform in _build(spec)[1])


def give_back(
    spec: CodecSpec, updates: Mapping[str, Update], layouts: Mapping[str, Layout], state: State | None = None
) -> State:
    """The state with a refused update added to its residual, so that the next encoding sends it again.

    Args:
        spec: codec and options that encoded the update; without error feedback the state stays as it is.
        updates: by channel, as :func:`decode` gave them.
        layouts: of the channels.
        state: what the latest encoding gave.

    Raises:
        CodecError: unknown codec or option, or a state of another model.
    """
    codec, transforms = _build(spec)
    new_state = dict(state or {})
    if keeps_residual(spec):
        for name, update in updates.items():
            _Channel(name, layouts[name], codec, transforms).give_back(update.vector(), new_state)
    return new_state


def encode_model(vector: Vector, layout: Layout) -> bytes:
    """The container of a model version: uncompressed, so that its hash stands for the exact values."""
    return encode(CodecSpec("raw"), {MODEL_CHANNEL: vector}, {MODEL_CHANNEL: layout}).data


def decode_model(data: bytes | memoryview, layout: Layout) -> Vector:
    """The inverse, float32 ``[layout.size]``, possibly a read-only view; raises CodecError."""
    return decode(data, {MODEL_CHANNEL: layout})[MODEL_CHANNEL].vector()


def check_finite(kind: str, vector: Vector, layout: Layout) -> None:
    """Refuses NaN and infinity.

    Raises:
        CodecError: names ``kind`` and the first tensor of the layout that holds such a value.
    """
    if _is_finite(vector):
        return
    for name, tensor in layout.split(vector).items():
        if not _is_finite(tensor):
            raise CodecError(f"{kind} holds a NaN or infinite value in tensor {name!r}")


def _is_finite(array: NDArray[np.float32]) -> bool:
    return array.size == 0 or (math.isfinite(array.min()) and math.isfinite(array.max()))


def _build(spec: CodecSpec) -> tuple[Codec, list[Transform]]:
    cls = codec_class(spec.name)
    own = {key: value for key, value in spec.options.items() if key not in OPTIONS}
    general = {key: value for key, value in spec.options.items() if key in OPTIONS}
    if cls.lossless and general:
        raise CodecError(f"codec {spec.name!r} loses nothing, so it takes no option {min(general)!r}")
    codec = cls(own)
    return codec, ([] if cls.lossless else chain(general, feedback=codec.uses_feedback()))


class _Channel:
    """One channel on its way through transforms and codec; buffers apart."""

    def __init__(self, name: str, layout: Layout, codec: Codec, transforms: list[Transform]) -> None:
        self._name, self._layout, self._codec, self._transforms = name, layout, codec, transforms
        self._split = bool(layout.buffers) and not codec.lossless
        self._trained = layout.only(buffers=False) if self._split else layout

    def encode(
        self, vector: Vector, before: State, after: State, request: Request
    ) -> tuple[list[bytes | memoryview], Update]:
        """The parts of the section and what they decode to; puts the new state into ``after``."""
        section: list[bytes | memoryview] = []
        values, buffers, budget = vector, None, request.budget_bytes
        if self._split:
            trained, rows = self._rows()
            values, buffers = vector[trained], self._encode_buffers(vector[rows], before, after, section)
            if budget is not None:
                budget -= len(section[0])
        states = []
        for transform in self._transforms:
            values, state = transform.apply(values, self._take(before, transform.name, values.size))
            check_finite(f"channel {self._name!r} after {transform.name!r}", values, self._trained)
            states.append((transform, values, state))
        own = self._take(before, "codec", None) or self._codec.init(self._trained)
        asked = Request(
            budget_bytes=None if budget is None else max(0, budget),
            seed=request.seed,
            reference=self._reference(request.reference),
        )
        payload, update, own = self._codec.encode(values, self._trained, own, asked)
        self._put(after, "codec", own)
        for transform, given, state in states:
            self._put(after, transform.name, transform.sent(given, update, state))
        section.append(payload)
        return section, self._joined(update, buffers)

    def decode(self, section: memoryview, reference: Vector | None) -> Update:
        """The inverse of ``encode``."""
        start, buffers = 0, None
        if self._split:
            buffers, start = self._decode_buffers(section)
        update = self._codec.decode_against(section[start:], self._trained, self._reference(reference))
        count = self._trained.size if update.indices is None else len(update.indices)
        if update.size != self._trained.size or update.values.shape != (count,) or update.values.dtype != np.float32:
            raise CodecError(f"codec {self._codec.name!r} gave {update.values.dtype} {update.values.shape}")
        return self._joined(update, buffers)

    def _reference(self, reference: Vector | None) -> Vector | None:
        """Without buffers; None for a channel of another size."""
        if reference is None or reference.shape != (self._layout.size,):
            return None
        return reference[self._rows()[0]] if self._split else reference

    def give_back(self, vector: Vector, state: State) -> None:
        """Adds ``vector``, float32 ``[layout.size]``, to the residual in ``state``."""
        parts = [("feedback", vector)]
        if self._split:
            trained, rows = self._rows()
            parts = [("feedback", vector[trained]), ("buffers", vector[rows])]
        for owner, part in parts:
            kept = self._take(state, owner, part.size)
            self._put(state, owner, {"residual": kept["residual"] + part if kept else part.copy()})

    def _encode_buffers(
        self, buffers: Vector, before: State, after: State, section: list[bytes | memoryview]
    ) -> Vector:
        feedback = any(transform.name == "feedback" for transform in self._transforms)
        if feedback:
            kept = self._take(before, "buffers", buffers.size)
            buffers = (buffers + kept["residual"]).astype(np.float32) if kept else buffers
        with np.errstate(over="ignore"):
            half = buffers.astype("<f2")
        fits = _is_finite(half.astype(np.float32))
        sent: Vector = half.astype(np.float32) if fits else buffers
        section.append((bytes([_F16]) + half.tobytes()) if fits else (bytes([_F32]) + buffers.astype("<f4").tobytes()))
        if feedback and (buffers != sent).any():
            self._put(after, "buffers", {"residual": buffers - sent})
        return sent

    def _decode_buffers(self, section: memoryview) -> tuple[Vector, int]:
        count = self._layout.size - self._trained.size
        if not section or section[0] not in (_F16, _F32):
            raise CodecError("buffers are damaged")
        dtype = np.dtype("<f2" if section[0] == _F16 else "<f4")
        stop = 1 + count * dtype.itemsize
        if stop > len(section):
            raise CodecError("buffers are cut off")
        return np.frombuffer(section[1:stop], dtype).astype(np.float32), stop

    def _joined(self, update: Update, buffers: Vector | None) -> Update:
        if buffers is None:
            return update
        trained, rows = self._rows()
        if update.indices is not None:
            indices = np.concatenate([trained[update.indices], rows])
            return Update(np.concatenate([update.values, buffers]), indices, self._layout.size)
        vector = np.empty(self._layout.size, np.float32)
        vector[trained], vector[rows] = update.values, buffers
        return Update(vector)

    def _rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in the vector of what is trained, and of the buffers."""
        spans = list(self._layout.spans())
        empty = [np.empty(0, np.int64)]
        trained = [np.arange(start, end) for name, _, start, end in spans if name not in self._layout.buffers]
        buffers = [np.arange(start, end) for name, _, start, end in spans if name in self._layout.buffers]
        return np.concatenate(empty + trained), np.concatenate(empty + buffers)

    def _take(self, state: State, owner: str, size: int | None) -> State:
        prefix = f"{self._name}.{owner}."
        found = {key[len(prefix) :]: array for key, array in state.items() if key.startswith(prefix)}
        if size is not None and any(array.shape != (size,) for array in found.values()):
            raise CodecError(f"the state of {owner!r} is of another model; a change of bundle starts without state")
        return found

    def _put(self, state: State, owner: str, arrays: State) -> None:
        state.update({f"{self._name}.{owner}.{key}": array for key, array in arrays.items()})


def _check(name: str, update: Update, layout: Layout, max_norm: float) -> None:
    if not _is_finite(update.values):
        check_finite(f"channel {name!r}", update.vector(), layout)
    if max_norm < math.inf:
        norm = update.norm()
        if not norm <= max_norm:
            raise CodecError(f"channel {name!r} has an L2 norm of {norm:.4g}, {max_norm:g} is the most that may be")
