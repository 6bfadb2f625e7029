"""Codecs by name: chains of stages, the built-in ones and those of installed packages.

A package adds a stage by the entry point group ``edge_runtime.codecs``: name = class with the
:class:`~edge_runtime.compression.base.Stage` protocol; the codec of that name is that one stage. Nothing is imported
before it is used: names alone cost no memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.compression.base import Packet
from edge_runtime.compression.frame import check_finite, decode_frame, encode_frame
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

    from edge_runtime.compression.base import Layout, Stage
    from edge_runtime.compression.frame import Vector

GROUP = "edge_runtime.codecs"
_STAGES = {"raw": "edge_runtime.compression.raw:Raw", "zstd": "edge_runtime.compression.zstd:Zstd"}
_CODECS: dict[str, tuple[str, ...]] = {"raw": ("raw",), "zstd": ("raw", "zstd")}
_loaded: dict[str, type[Stage]] = {}
_states = msgspec.msgpack.Decoder(dict[str, list[bytes]])


def codec_names() -> list[str]:
    """Names of all codecs, sorted; imports none of them."""
    return sorted({*_CODECS, *_entry_points()})


def stage_names() -> list[str]:
    """Names of all stages, sorted; imports none of them."""
    return sorted({*_STAGES, *_entry_points()})


def stage_class(name: str) -> type[Stage]:
    """The class of a stage.

    Raises:
        CodecError: there is no such stage, or its package cannot be imported.
    """
    known = _loaded.get(name)
    if known is not None:
        return known
    if name in _STAGES:
        module, _, attribute = _STAGES[name].partition(":")
        stage: type[Stage] = getattr(import_module(module), attribute)
    else:
        entry = _entry_points().get(name)
        if entry is None:
            raise CodecError(f"codec stage {name[:64]!r} is unknown here; known: {', '.join(stage_names())}")
        try:
            stage = entry.load()
        except Exception as error:
            raise CodecError(f"codec stage {name!r} cannot be imported from {entry.value}: {error}") from error
    _loaded[name] = stage
    return stage


def stages(codec: str) -> list[Stage]:
    """New stages of a codec, in the order of encoding; raises CodecError if it is unknown."""
    if codec not in _CODECS and codec not in _entry_points():
        raise CodecError(f"codec {codec[:64]!r} is unknown here; known: {', '.join(codec_names())}")
    return [stage_class(name)() for name in _CODECS.get(codec, (codec,))]


def encode(
    codec: str, vectors: Mapping[str, Vector], layouts: Mapping[str, Layout], state: bytes = b""
) -> tuple[bytes, bytes]:
    """Frame of the vectors (float32 ``[layout.size]`` by channel), and the codec's state for the next time.

    ``state`` is what the previous call gave, or ``b""`` at the start.

    Raises:
        CodecError: unknown codec, other channels than ``layouts``, a wrong size, a value that is not finite, or a
            state of another codec.
    """
    chain = stages(codec)
    if sorted(vectors) != sorted(layouts):
        raise CodecError(f"channels {sorted(vectors)} given, expected {sorted(layouts)}")
    try:
        states = _states.decode(state) if state else {}
    except msgspec.MsgspecError as error:
        raise CodecError(f"codec state is damaged: {error}") from error
    packets: dict[str, Packet] = {}
    for name, vector in vectors.items():
        layout = layouts[name]
        if vector.shape != (layout.size,) or vector.dtype.str not in ("<f4", "=f4"):
            raise CodecError(f"channel {name!r} is {vector.dtype} {vector.shape}, expected float32 ({layout.size},)")
        check_finite(f"channel {name!r}", vector, layout)
        before = states.get(name, [b""] * len(chain))
        if len(before) != len(chain):
            raise CodecError(f"codec state of channel {name!r} belongs to another codec than {codec!r}")
        packet, after = Packet({"values": vector}), []
        for stage, stage_state in zip(chain, before, strict=True):
            packet, new_state = stage.encode(packet, layout, stage_state)
            after.append(new_state)
        packets[name], states[name] = packet, after
    keeps = any(part for parts in states.values() for part in parts)
    return encode_frame(packets, chain), msgspec.msgpack.encode(states) if keeps else b""


def decode(data: bytes | memoryview, layouts: Mapping[str, Layout]) -> dict[str, Vector]:
    """Vectors float32 ``[layout.size]`` by channel, possibly read-only views of ``data``.

    Raises:
        CodecError: see :func:`edge_runtime.compression.frame.decode_frame`.
    """
    return decode_frame(data, layouts)


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}
