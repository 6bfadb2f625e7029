"""Lossless compression with Zstandard; bytes of equal significance are put side by side first (byte shuffle)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
import numpy as np
from backports import zstd

from edge_runtime.compression.base import Layout, Packet
from edge_runtime.errors import CodecError

_DTYPES = ("f4", "f2", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    name: str
    dtype: str
    shape: list[int]


_entries = msgspec.msgpack.Decoder(list[_Entry])


class Zstd:
    """Compresses all arrays of a packet into two: ``z`` (one Zstandard frame) and ``t`` (names, types, shapes)."""

    name: ClassVar[str] = "zstd"

    def __init__(self, level: int = 3) -> None:
        self.level = level

    def config(self) -> dict[str, Any]:
        """Nothing: a Zstandard frame decodes at any level."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Zstd:
        """Raises CodecError if there is any configuration."""
        if config:
            raise CodecError(f"codec 'zstd' takes no configuration, got {sorted(config)}")
        return cls()

    def encode(self, packet: Packet, layout: Layout, state: bytes) -> tuple[Packet, bytes]:  # noqa: ARG002
        """One compressed array; keeps no state."""
        table, parts = [], []
        for name, array in packet.arrays.items():
            table.append(_Entry(name, array.dtype.str[1:], list(array.shape)))
            planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
            parts.append(planes.tobytes())
        packed = zstd.compress(b"".join(parts), level=self.level)
        arrays = {"t": msgspec.msgpack.encode(table), "z": packed}
        return Packet({name: np.frombuffer(data, np.uint8) for name, data in arrays.items()}), state

    def decode(self, packet: Packet, layout: Layout) -> Packet:
        """The arrays; raises CodecError if they are damaged or larger than ``layout`` allows."""
        if sorted(packet.arrays) != ["t", "z"] or any(array.dtype != np.uint8 for array in packet.arrays.values()):
            raise CodecError("codec 'zstd' needs the byte arrays 't' and 'z'")
        try:
            table = _entries.decode(packet.arrays["t"].tobytes())
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise CodecError(f"codec 'zstd': table is damaged: {error}") from error
        sizes = []
        for entry in table:
            if entry.dtype not in _DTYPES or len(entry.shape) > 4 or any(size < 0 for size in entry.shape):
                raise CodecError(f"codec 'zstd': array {entry.name!r} has an impossible type or shape")
            sizes.append(math.prod(entry.shape) * np.dtype(entry.dtype).itemsize)
        if sum(sizes) > 16 * layout.size + 64 * 1024:
            raise CodecError(f"codec 'zstd': {sum(sizes)} decompressed bytes are more than the layout allows")
        data = _decompress(packet.arrays["z"], sum(sizes))
        arrays: dict[str, np.ndarray] = {}
        at = 0
        for entry, size in zip(table, sizes, strict=True):
            dtype = np.dtype(f"<{entry.dtype}")
            planes = np.frombuffer(data, np.uint8, size, at).reshape(dtype.itemsize, -1)
            arrays[entry.name] = np.ascontiguousarray(planes.T).reshape(-1).view(dtype).reshape(entry.shape)
            at += size
        return Packet(arrays)


def _decompress(packed: np.ndarray, size: int) -> bytes:
    data = packed.tobytes()
    try:
        # The library allocates what the frame claims, so the claim is checked before.
        if zstd.get_frame_info(data).decompressed_size != size:
            raise CodecError(f"codec 'zstd': the frame does not hold the {size} bytes that its table needs")
        if size == 0:
            return b""
        decompressor = zstd.ZstdDecompressor()
        out: bytes = decompressor.decompress(data, size)
    except zstd.ZstdError as error:
        raise CodecError(f"codec 'zstd': damaged data ({error})") from error
    if decompressor.unused_data:
        raise CodecError(f"codec 'zstd': {len(decompressor.unused_data)} bytes follow the frame")
    if len(out) != size:
        raise CodecError(f"codec 'zstd': {len(out)} bytes came out, {size} expected")
    return out
