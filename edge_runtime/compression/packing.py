"""What several codecs are made of: packed bits, sorted positions in few bits, and random words from a seed.

Integers only, so that every machine reads the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED_MASK = 0xFFFFFFFF


def random_words(seed: int, count: int) -> NDArray[np.uint64]:
    """Uint64 ``[count]``, the raw output of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
    3", SC 2011) under the low 32 bits of ``seed``: no distribution of NumPy's, whose streams may change.
    """
    words: NDArray[np.uint64] = np.random.Philox(key=seed & SEED_MASK).random_raw(count)
    return words


def random_bits(seed: int, count: int) -> NDArray[np.uint8]:
    """Zeros and ones, uint8 ``[count]``."""
    return np.unpackbits(random_words(seed, -(-count // 64)).astype("<u8").view(np.uint8), count=count)


def pack_bits(bits: NDArray[Any]) -> bytes:
    """``ceil(n / 8)`` bytes of a bool or 0/1 array ``[n]``, the first bit highest."""
    return np.packbits(bits).tobytes()


def unpack_bits(payload: memoryview, count: int) -> NDArray[np.uint8]:
    """The inverse, uint8 ``[count]`` of zeros and ones.

    Raises:
        CodecError: another number of bytes, or bits set behind the last.
    """
    if len(payload) != -(-count // 8):
        raise CodecError(f"{len(payload)} bytes for {count} bits")
    if count % 8 and payload[-1] & ((1 << -count % 8) - 1):
        raise CodecError("bits are set behind the last")
    return np.unpackbits(np.frombuffer(payload, np.uint8), count=count)


def pack_positions(indices: NDArray[np.int64], size: int) -> bytes:
    """Sorted unique positions below ``size`` as Rice-coded gaps: a byte for the width ``w``, all low ``w`` bits, then
    all the rest in unary. The best width is found by trying; width 0 is a bitmap.

    Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979, which is Golomb's code for powers of
    two; the two parts stand apart, as Elias and Fano have them, so that NumPy reads whole arrays.

    Args:
        indices: int64 ``[k]``; nothing is written for none.
        size: what all of them are below.
    """
    count = len(indices)
    if count == 0:
        return b""
    gaps = np.diff(indices, prepend=-1) - 1
    costs, rest = [], gaps
    for width in _widths(count, size):
        costs.append(-(-count * width // 8) - (-(count + int(rest.sum())) // 8))
        rest = rest >> 1
    width = costs.index(min(costs))
    low = np.empty((count, width), np.uint8)
    for place in range(width):
        low[:, place] = (gaps >> (width - 1 - place)) & 1
    ends = np.cumsum((gaps >> width) + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    return bytes([width]) + pack_bits(low) + pack_bits(unary)


def unpack_positions(payload: memoryview, count: int, size: int) -> NDArray[np.int64]:
    """The inverse, int64 ``[count]``, strictly increasing.

    Raises:
        CodecError: more positions than ``size``, one beyond it, or bytes that are missing or left.
    """
    if not 0 <= count <= size:
        raise CodecError(f"{count} positions among {size}")
    if count == 0:
        if len(payload):
            raise CodecError(f"{len(payload)} bytes for no positions")
        return np.empty(0, np.int64)
    if not len(payload) or payload[0] not in _widths(count, size):
        raise CodecError("width of the positions is missing or impossible")
    width = payload[0]
    split = 1 + -(-count * width // 8)
    bits = 8 * (len(payload) - split)
    if not count <= bits <= count + ((size - count) >> width) + 7:
        raise CodecError(f"{len(payload)} bytes do not hold {count} positions among {size}")
    low = unpack_bits(payload[1:split], count * width).reshape(count, width)
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(payload[split:], np.uint8)))
    if len(ends) != count or ends[-1] < bits - 8:
        raise CodecError(f"positions are not the {count} announced")
    gaps = np.diff(ends, prepend=-1).astype(np.int64) - 1
    for place in range(width):
        gaps = (gaps << 1) | low[:, place]
    indices: NDArray[np.int64] = np.cumsum(gaps + 1) - 1
    if indices[-1] >= size:
        raise CodecError(f"position {indices[-1]} is beyond the {size} elements")
    return indices


def positions_limit(count: int, size: int) -> int:
    """Most bytes that ``pack_positions`` takes for any ``count`` positions; never less for a larger count."""
    if count == 0:
        return 0
    return 1 + min(
        -(-count * width // 8) - (-(count + ((size - count) >> width)) // 8) for width in _widths(count, size)
    )


def _widths(count: int, size: int) -> range:
    """Widths that can be worth while; keeps what a hostile width costs below 2 * size bits."""
    return range((2 * size // count).bit_length())
