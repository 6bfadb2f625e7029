"""Lossless compression with Zstandard; bytes of equal significance are put side by side first (byte shuffle)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from backports import zstd

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector

LEVEL = 3


class Zstd(Codec):
    """One Zstandard frame of the four byte planes of the float32 values."""

    name: ClassVar[str] = "zstd"
    number: ClassVar[int] = 2
    lossless: ClassVar[bool] = True
    feedback: ClassVar[bool] = False

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:  # noqa: ARG002
        """One Zstandard frame, nothing for an empty layout."""
        return Encoded(pack_planes(np.ascontiguousarray(values, "<f4")), Update(values), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """The values; nothing is allocated before the frame's claim fits the layout."""
        return Update(unpack_planes(payload, np.dtype("<f4"), layout.size))


def pack_planes(array: NDArray[Any]) -> bytes:
    """A Zstandard frame of the byte planes of a one-dimensional array; nothing for an empty one."""
    if array.size == 0:
        return b""
    planes = array.view(np.uint8).reshape(-1, array.itemsize).T
    packed: bytes = zstd.compress(planes.tobytes(), level=LEVEL)
    return packed


def unpack_planes(payload: memoryview, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """The inverse, ``[count]``; raises CodecError."""
    size = count * dtype.itemsize
    data = _decompress(bytes(payload), size)
    planes = np.frombuffer(data, np.uint8, size).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def _decompress(data: bytes, size: int) -> bytes:
    if size == 0:
        if data:
            raise CodecError(f"{len(data)} bytes for no numbers")
        return b""
    try:
        # The library allocates what the frame claims, so the claim is checked before.
        if zstd.get_frame_info(data).decompressed_size != size:
            raise CodecError(f"the Zstandard frame does not hold the {size} bytes that the layout needs")
        # nor may the frame ask for a window beyond its content
        options = {int(zstd.DecompressionParameter.window_log_max): max(10, size.bit_length())}
        decompressor = zstd.ZstdDecompressor(options=options)
        out: bytes = decompressor.decompress(data, size)
    except zstd.ZstdError as error:
        raise CodecError(f"damaged Zstandard data ({error})") from error
    if decompressor.unused_data:
        raise CodecError(f"{len(decompressor.unused_data)} bytes follow the Zstandard frame")
    if len(out) != size:
        raise CodecError(f"{len(out)} bytes came out, {size} expected")
    return out
