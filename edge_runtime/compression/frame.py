"""The frame: bytes of one or more encoded vectors, with all that is needed to decode them.

Layout of a frame, all integers little-endian::

    4 bytes  magic "EFRM"
    u16      format version
    u16      bytes of padding at the end of the header, 0 to 3
    u32      length of the header in bytes, a multiple of 4
    header   MessagePack [stages, channels, arrays], padded with zeros
             stages    [[name, config], ...] in the order of encoding
             channels  [name, ...]
             arrays    [[channel index, name, dtype, shape], ...], widest items first, so that each is aligned
    arrays   raw bytes, one after the other

Decoding allocates no more than the receiver's own layouts allow: shapes in the header are checked against the bytes
that are there and against the layout before anything is made of them.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from edge_runtime.compression.base import Layout, Packet, Stage
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Vector: TypeAlias = NDArray[np.float32]

MAGIC = b"EFRM"
FRAME_VERSION = 1
HEADER_LIMIT_BYTES = 64 * 1024
_PREFIX = struct.Struct("<4sHHI")
_DTYPES = ("f4", "f2", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
_MAX_STAGES = 8
_MAX_CHANNELS = 16
_MAX_ARRAYS = 64


class _Array(msgspec.Struct, array_like=True, frozen=True):
    channel: int
    name: str
    dtype: str
    shape: list[int]


class _Header(msgspec.Struct, array_like=True, frozen=True):
    stages: list[tuple[str, dict[str, Any]]]
    channels: list[str]
    arrays: list[_Array]


_header_decoder = msgspec.msgpack.Decoder(_Header)


def payload_limit(layout: Layout) -> int:
    """Most bytes that the encoded arrays of one vector may take: room for indices and values, and small tables."""
    return 16 * layout.size + 64 * 1024


def frame_limit(layouts: Mapping[str, Layout]) -> int:
    """Most bytes of a frame with these channels; what is longer need not be read."""
    return _PREFIX.size + HEADER_LIMIT_BYTES + sum(payload_limit(layout) for layout in layouts.values())


def check_finite(kind: str, vector: Vector, layout: Layout) -> None:
    """Refuses NaN and infinity.

    Raises:
        CodecError: names ``kind`` and the first tensor of the layout that holds such a value.
    """
    if vector.size == 0 or (math.isfinite(vector.min()) and math.isfinite(vector.max())):
        return
    for name, tensor in layout.split(vector).items():
        if tensor.size and not (math.isfinite(tensor.min()) and math.isfinite(tensor.max())):
            raise CodecError(f"{kind} holds a NaN or infinite value in tensor {name!r}")


def encode_frame(channels: Mapping[str, Packet], stages: Sequence[Stage]) -> bytes:
    """Bytes of the encoded packets, by channel; ``stages`` is the chain that made them.

    Raises:
        CodecError: an array has a type that a frame does not carry, or there are too many.
    """
    import numpy as np

    entries: list[tuple[_Array, NDArray[Any]]] = []
    for index, packet in enumerate(channels.values()):
        for name, given in packet.arrays.items():
            array = np.ascontiguousarray(given).reshape(given.shape)
            if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
                array = array.astype(array.dtype.newbyteorder("<"))
            code = array.dtype.str[1:]
            if code not in _DTYPES:
                raise CodecError(f"array {name!r} has type {array.dtype}, a frame carries {', '.join(_DTYPES)}")
            entries.append((_Array(index, name, code, list(array.shape)), array))
    entries.sort(key=lambda entry: -entry[1].itemsize)
    header = msgspec.msgpack.encode(
        _Header([(stage.name, stage.config()) for stage in stages], list(channels), [entry for entry, _ in entries])
    )
    padding = -len(header) % 4
    header += bytes(padding)
    if len(header) > HEADER_LIMIT_BYTES or len(entries) > _MAX_ARRAYS or len(channels) > _MAX_CHANNELS:
        raise CodecError(f"a frame of {len(channels)} channels and {len(entries)} arrays is over the format's limits")
    prefix = _PREFIX.pack(MAGIC, FRAME_VERSION, padding, len(header))
    return b"".join([prefix, header, *(array.data for _, array in entries if array.size)])


def decode_frame(data: bytes | memoryview, layouts: Mapping[str, Layout]) -> dict[str, Vector]:
    """Vectors float32 ``[layout.size]`` by channel; read-only views of ``data`` where the codec allows.

    Raises:
        CodecError: no frame, a newer version, damaged, an unknown stage, other channels than ``layouts``, a wrong
            size, trailing bytes, or a value that is not finite.
    """
    import numpy as np

    from edge_runtime.compression.registry import stage_class

    view = memoryview(data)
    header, start = _read_header(view)
    if sorted(header.channels) != sorted(layouts) or len(set(header.channels)) != len(header.channels):
        raise CodecError(f"frame carries channels {header.channels}, expected {sorted(layouts)}")
    stages = [stage_class(name).from_config(config) for name, config in header.stages]
    packets = _read_arrays(view[start:], header, layouts)
    vectors: dict[str, Vector] = {}
    for name, packet in packets.items():
        layout = layouts[name]
        try:
            for stage in reversed(stages):
                packet = stage.decode(packet, layout)  # noqa: PLW2901 - the chain unwinds
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            raise CodecError(f"channel {name!r} cannot be decoded: {error}") from error
        values = packet.arrays.get("values")
        if values is None or len(packet.arrays) != 1 or values.dtype != np.float32:
            raise CodecError(f"channel {name!r} does not decode to one float32 array 'values'")
        if values.shape != (layout.size,):
            raise CodecError(f"channel {name!r} decodes to shape {values.shape}, expected ({layout.size},)")
        check_finite(f"channel {name!r}", values, layout)
        vectors[name] = values
    return vectors


def _read_header(view: memoryview) -> tuple[_Header, int]:
    if len(view) < _PREFIX.size or view[:4] != MAGIC:
        raise CodecError("these bytes are no frame (bad magic)")
    _, version, padding, length = _PREFIX.unpack_from(view)
    if version > FRAME_VERSION or version < 1:
        raise CodecError(
            f"frame version {version} is not read here (up to {FRAME_VERSION}); update edge-training-runtime"
        )
    end = _PREFIX.size + length
    if length > HEADER_LIMIT_BYTES or length % 4 or end > len(view) or padding > min(3, length):
        raise CodecError(f"frame header of {length} bytes is too large, not aligned or cut off")
    try:
        header = _header_decoder.decode(view[_PREFIX.size : end - padding])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"frame header is damaged: {error}") from error
    if len(header.stages) > _MAX_STAGES or len(header.channels) > _MAX_CHANNELS or len(header.arrays) > _MAX_ARRAYS:
        raise CodecError("frame header lists too many stages, channels or arrays")
    return header, end


def _read_arrays(view: memoryview, header: _Header, layouts: Mapping[str, Layout]) -> dict[str, Packet]:
    import numpy as np

    packets = {name: Packet() for name in header.channels}
    sizes = dict.fromkeys(header.channels, 0)
    at = 0
    for entry in header.arrays:
        if not 0 <= entry.channel < len(header.channels):
            raise CodecError(f"array {entry.name!r} belongs to channel {entry.channel}, which the frame does not have")
        channel = header.channels[entry.channel]
        if entry.dtype not in _DTYPES:
            raise CodecError(f"array {entry.name!r} has type {entry.dtype!r}, which is not allowed")
        if len(entry.shape) > 4 or any(size < 0 for size in entry.shape):
            raise CodecError(f"array {entry.name!r} has an impossible shape {entry.shape[:8]}")
        dtype = np.dtype(f"<{entry.dtype}")
        count = math.prod(entry.shape)
        size = count * dtype.itemsize
        sizes[channel] += size
        if sizes[channel] > payload_limit(layouts[channel]):
            raise CodecError(f"channel {channel!r} carries more bytes than its layout allows")
        if at + size > len(view):
            raise CodecError(f"array {entry.name!r} needs {size} bytes, the frame has {len(view) - at} left")
        if entry.name in packets[channel].arrays:
            raise CodecError(f"array {entry.name!r} comes twice in channel {channel!r}")
        array = np.frombuffer(view, dtype, count, at) if count else np.empty(0, dtype)
        packets[channel].arrays[entry.name] = array.reshape(entry.shape)
        at += size
    if at != len(view):
        raise CodecError(f"frame has {len(view) - at} bytes too many")
    return packets
