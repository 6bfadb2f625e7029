"""Codecs by name and by number: the built-in ones, and those of installed packages.

A package adds a codec by the entry point group ``edge_runtime.codecs``: name = class derived from
:class:`~edge_runtime.compression.base.Codec`. Nothing is imported before it is used: names alone cost no memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from edge_runtime.errors import CodecError
from edge_runtime.plugins import any_installed

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from edge_runtime.compression.base import Codec

GROUP = "edge_runtime.codecs"
_HERE = "edge_runtime.compression"
_BUILT_IN: dict[str, tuple[int, str]] = {  # numbers are part of the format: never change or reuse one
    "raw": (1, "raw:Raw"),
    "zstd": (2, "zstd:Zstd"),
    "default": (3, "default:Default"),
    "lowrank": (4, "lowrank_codec:LowRank"),
    "sparse": (5, "sparse:Sparse"),
    "fedzip": (6, "fedzip:FedZip"),
    "topk": (7, "topk:TopK"),
    "int8": (8, "quantised:Int8"),
    "int4": (9, "quantised:Int4"),
    "sign": (10, "sign:Sign"),
    "stc": (11, "stc:Stc"),
    "eden": (12, "eden:Eden"),
    "randomk": (13, "randomk:RandomK"),
    "half": (14, "half:Half"),
    "powersgd": (15, "powersgd:PowerSgd"),
}
_NAMES = {number: name for name, (number, _) in _BUILT_IN.items()}
_loaded: dict[str, type[Codec]] = {}


def codec_names() -> list[str]:
    """Names of all codecs, sorted; imports none of them."""
    return sorted({*_BUILT_IN, *_entry_points()})


def codec_class(codec: str | int) -> type[Codec]:
    """The class of a codec, by name or by its number in the container.

    Raises:
        CodecError: there is no such codec, or its package cannot be imported.
    """
    if isinstance(codec, int):
        if codec not in _NAMES:
            raise CodecError(f"codec number {codec} is unknown here; update edge-training-runtime")
        codec = _NAMES[codec]
    known = _loaded.get(codec)
    if known is not None:
        return known
    if codec in _BUILT_IN:
        module, _, attribute = _BUILT_IN[codec][1].partition(":")
        found: type[Codec] = getattr(import_module(f"{_HERE}.{module}"), attribute)
    else:
        entry = _entry_points().get(codec)
        if entry is None:
            raise CodecError(f"codec {codec[:64]!r} is unknown here; known: {', '.join(codec_names())}")
        try:
            found = entry.load()
        except Exception as error:
            raise CodecError(f"codec {codec!r} cannot be imported from {entry.value}: {error}") from error
    _loaded[codec] = found
    return found


def _entry_points() -> dict[str, EntryPoint]:
    if not any_installed(GROUP):
        return {}
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}
