"""Hostile bytes: valid blobs of every codec, and what is made of them; all from a seed and a number."""

from __future__ import annotations

import random
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from backports import zstd

from edge_runtime.compression import Layout
from edge_runtime.compression.container import unpack, varint
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, encode
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from edge_runtime.compression.base import Value

SNAPSHOT = "snapshot"  # stands among the codecs for the snapshots of a shared model
LAYOUTS = {
    "buffers": {
        "delta": Layout(("w", "b", "mean", "var"), ((4, 3), (3,), (3,), (3,)), frozenset({"mean", "var"})),
    },
    "channels": {
        "control": Layout(("w", "b"), ((6, 5), (6,))),
        "delta": Layout(("w", "b", "mean"), ((6, 5), (6,), (2,)), frozenset({"mean"})),
    },
    "matrices": {"delta": Layout(("a", "k", "b", "e"), ((40, 24), (8, 3, 3, 3), (40,), (0, 4)))},
    "scalars": {"delta": Layout(tuple(f"s{i}" for i in range(20)), ((),) * 20)},
    "one": {"delta": Layout(("s",), ((1,),))},
    "none": {"delta": Layout((), ())},
    "large": {"delta": Layout(("w", "v"), ((300, 200), (5000,)))},
}
_FAMILIES: tuple[dict[str, Value], ...] = (  # of the default codec, each in its turn
    {"family": "uniform", "target_ratio": 6.0},
    {"family": "lowrank", "target_ratio": 8.0},
    {},
    {"family": "exact", "target_ratio": 0.7},
    {"family": "sparse", "target_ratio": 12.0},
)
_BOMB = zstd.compress(bytes(1 << 24))
_SPECIAL = (0, 1, 2, 0x7F, 0x80, 0x81, 0xFE, 0xFF)
_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1)


class Blob(NamedTuple):
    """A valid container: its codec, its layout's key in ``LAYOUTS``, and where its first section begins.

    ``predicted`` says whether it was encoded, and is decoded, against a model that both ends hold.
    """

    codec: str
    layout: str
    data: bytes
    section: int
    predicted: bool = False


class Case(NamedTuple):
    """Bytes to decode, and what they were made from."""

    blob: Blob
    kind: str
    data: bytes


def reference(name: str, *, predicted: bool) -> np.ndarray | None:
    """A model for the layout of this name, float32; None if nothing is predicted."""
    if not predicted:
        return None
    return np.random.default_rng(7).normal(size=LAYOUTS[name]["delta"].size).astype(np.float32)


def corpus(codecs: list[str]) -> list[Blob]:
    """Valid blobs of the codecs for all layouts; large ones are few."""
    blobs = []
    for codec in codecs:
        for name, layouts in LAYOUTS.items():
            if codec == SNAPSHOT and len(layouts) > 1:
                continue
            for variant in range(1 if name in ("large", "none") else 5):
                data = _encoded(codec, name, variant)
                _, sections = unpack(data, _channels(codec, name))
                start = min(start for start, _ in sections.values())
                blobs.append(Blob(codec, name, data, start, predicted=variant == 4))
    return blobs


def _channels(codec: str, name: str) -> dict[str, Layout]:
    return {MODEL_CHANNEL: LAYOUTS[name]["delta"]} if codec == SNAPSHOT else LAYOUTS[name]


def _encoded(codec: str, name: str, variant: int) -> bytes:
    generator = np.random.default_rng([variant, len(name)])
    vectors = {}
    for channel, layout in LAYOUTS[name].items():
        vector = generator.standard_t(3, layout.size).astype(np.float32)
        vectors[channel] = vector * np.float32((1, 1e-3, 0, 1, 0.01)[variant])
    if codec == SNAPSHOT:
        return SharedModel.start(vectors["delta"], LAYOUTS[name]["delta"]).encode()
    options: dict[str, Value] = {}
    if codec == "default":
        options = _FAMILIES[variant]
    elif variant == 3 and "density" in codec_class(codec).defaults:
        options = {"density": 0.3}
    model = reference(name, predicted=variant == 4)
    try:
        return encode(CodecSpec(codec, options), vectors, LAYOUTS[name], seed=variant, reference=model).data
    except CodecError:  # a family that has no code for so small a layout
        return encode(CodecSpec(codec), vectors, LAYOUTS[name], seed=variant, reference=model).data


def make_case(blobs: list[Blob], seed: int, number: int) -> Case:
    """Case ``number``: made from the seed and the number alone."""
    dice = random.Random(f"{seed}:{number}")
    blob = dice.choice(blobs)
    while blob.layout == "large" and dice.random() < 0.8:
        blob = dice.choice(blobs)
    kind = dice.choice(sorted(_MUTATIONS))
    data = bytearray(blob.data[:-4])
    low = blob.section if dice.random() < 0.85 else 0  # the header is soon tested
    data = _MUTATIONS[kind](dice, data, low, blob, blobs)
    if kind != "splice" and dice.random() < 0.15:
        data = _flip(dice, data, low, blob, blobs)
    if dice.random() < 0.95:
        return Case(blob, kind, bytes(data) + struct.pack("<I", zlib.crc32(data)))
    return Case(blob, kind, bytes(data) + blob.data[-4:])


def _at(dice: random.Random, data: bytearray, low: int) -> int:
    if low >= len(data):
        return len(data)
    if dice.random() < 0.5:  # counts, scales and tables stand in front
        return min(len(data) - 1, low + int(dice.expovariate(0.15)))
    return dice.randrange(low, len(data))


def _flip(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    for _ in range(dice.randint(1, 4)):
        if (at := _at(dice, data, low)) < len(data):
            data[at] ^= 1 << dice.randrange(8)
    return data


def _set(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    for _ in range(dice.randint(1, 6)):
        if (at := _at(dice, data, low)) < len(data):
            data[at] = dice.choice(_SPECIAL) if dice.random() < 0.5 else dice.randrange(256)
    return data


def _cut(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    return data[: _at(dice, data, low)]


def _extend(dice: random.Random, data: bytearray, *_: Any) -> bytearray:
    length = dice.choice((1, 2, 3, 4, 8, 64))
    return data + (bytes(length) if dice.random() < 0.5 else dice.randbytes(length))


def _delete(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    at = _at(dice, data, low)
    del data[at : at + dice.randint(1, 8)]
    return data


def _repeat(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    at, length = _at(dice, data, low), dice.randint(1, 32)
    data[at:at] = data[at : at + length] * dice.randint(1, 4)
    return data


def _number(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    """A number in the place of another, as LEB128 or in fixed width."""
    at, number = _at(dice, data, low), dice.choice(_NUMBERS) + dice.choice((0, 0, 1, -1))
    number = max(0, number)
    width = dice.choice((1, 2, 4, 8))
    written = varint(number) if dice.random() < 0.6 else (number % (1 << 8 * width)).to_bytes(width, "little")
    data[at : at + (1 if dice.random() < 0.5 else len(written))] = written
    return data


def _floats(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    """A float that is infinite, NaN (quiet or signalling), huge or tiny somewhere in the data."""
    word = dice.choice((b"\0\0\x80\x7f", b"\1\0\x80\x7f", b"\0\0\xc0\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\x7c"))
    at = _at(dice, data, low)
    data[at : at + len(word)] = word
    return data


def _splice(dice: random.Random, data: bytearray, low: int, blob: Blob, blobs: list[Blob]) -> bytearray:
    """The beginning of one and the end of another, of the same codec and layout more often than not."""
    alike = [other for other in blobs if (other.codec, other.layout) == (blob.codec, blob.layout)]
    other = dice.choice(alike if dice.random() < 0.7 else blobs)
    return data[: _at(dice, data, low)] + other.data[_at(dice, bytearray(other.data), low) : -4]


def _rename(dice: random.Random, data: bytearray, _low: int, _blob: Blob, blobs: list[Blob]) -> bytearray:
    """The payload of one codec under the number of another."""
    data[3] = dice.choice(blobs).data[3] if dice.random() < 0.9 else dice.randrange(256)
    return data


def _bomb(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    """A Zstandard frame of 16 MB of zeros, from somewhere on."""
    return data[: _at(dice, data, low)] + _BOMB


def _random(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    return data[:low] + dice.randbytes(dice.choice((0, 1, 2, 3, 5, 8, 13, 40, 200, len(data))))


_MUTATIONS = {
    "bomb": _bomb,
    "bytes": _set,
    "cut": _cut,
    "delete": _delete,
    "extend": _extend,
    "flips": _flip,
    "floats": _floats,
    "number": _number,
    "random": _random,
    "rename": _rename,
    "repeat": _repeat,
    "splice": _splice,
}
