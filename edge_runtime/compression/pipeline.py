"""Encoding and decoding of whole updates and models: transforms, then a codec, then the container."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edge_runtime.compression.base import Codec, Layout, Request, Update, Value
from edge_runtime.compression.channel import Channel, check_finite
from edge_runtime.compression.container import Header, header_bytes, pack, unpack
from edge_runtime.compression.registry import codec_class
from edge_runtime.compression.transforms import OPTIONS, Transform, chain
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edge_runtime.compression.base import State, Vector

MODEL_CHANNEL = "model"


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
        channel = Channel(name, layout, codec, transforms)
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
    reference: Vector | Callable[[], Vector] | None = None,
) -> dict[str, Update]:
    """Updates by channel, possibly views of ``data``.

    Args:
        data: a container.
        layouts: of the channels, from the receiver's own manifest.
        base_version: refuse values relative to another model version; None: any.
        tag: refuse another update; None: any.
        max_norm: refuse a larger L2 norm of a channel's buffers, or of all else in it.
        reference: what ``encode`` was given, or a function that gives it, called only if the codec may predict.

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
    cls = codec_class(header.codec)
    codec = cls()
    if callable(reference):
        reference = reference() if cls.decode_against is not Codec.decode_against else None
    view = memoryview(data)
    updates = {}
    for name, (start, end) in sections.items():
        channel = Channel(name, layouts[name], codec, [])
        try:
            updates[name] = channel.decode(view[start:end], reference, max_norm)
        except CodecError as error:
            raise CodecError(f"channel {name!r}: {error}") from error
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            raise CodecError(f"channel {name!r} cannot be decoded: {error}") from error
    return updates


def predicts(data: bytes | memoryview, layouts: Mapping[str, Layout]) -> bool:
    """Whether decoding these bytes needs the ``reference`` that they were encoded with; raises CodecError."""
    header, sections = unpack(data, layouts)
    codec, view = codec_class(header.codec)(), memoryview(data)
    parts = [(Channel(name, layouts[name], codec, []), view[start:end]) for name, (start, end) in sections.items()]
    return any(channel.predicts(section) for channel, section in parts)


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
            Channel(name, layouts[name], codec, transforms).give_back(update.vector(), new_state)
    return new_state


def encode_model(vector: Vector, layout: Layout) -> bytes:
    """The container of a model version: uncompressed, so that its hash stands for the exact values."""
    return encode(CodecSpec("raw"), {MODEL_CHANNEL: vector}, {MODEL_CHANNEL: layout}).data


def decode_model(data: bytes | memoryview, layout: Layout) -> Vector:
    """The inverse, float32 ``[layout.size]``, possibly a read-only view; raises CodecError."""
    return decode(data, {MODEL_CHANNEL: layout})[MODEL_CHANNEL].vector()


def _build(spec: CodecSpec) -> tuple[Codec, list[Transform]]:
    cls = codec_class(spec.name)
    own = {key: value for key, value in spec.options.items() if key not in OPTIONS}
    general = {key: value for key, value in spec.options.items() if key in OPTIONS}
    if cls.lossless and general:
        raise CodecError(f"codec {spec.name!r} loses nothing, so it takes no option {min(general)!r}")
    codec = cls(own)
    if cls.feedback and not codec.uses_feedback() and general.get("error_feedback"):
        raise CodecError(f"codec {spec.name!r} with these options does not go with error_feedback: it would diverge")
    return codec, ([] if cls.lossless else chain(general, feedback=codec.uses_feedback()))
