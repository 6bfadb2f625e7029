"""Fields of any number of bits, laid end to end, the lowest bit first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pack_fields(values: NDArray[np.uint64], widths: NDArray[np.int64]) -> bytes:
    """Bytes of the fields; what fills no byte is padded with zeros.

    Args:
        values: uint64 ``[n]``, below ``2**widths``.
        widths: int64 ``[n]``, bits of each field, 0 to 56.
    """
    ends = np.cumsum(widths)
    total = int(ends[-1]) if ends.size else 0
    starts = ends - widths
    word, shift = starts >> 6, (starts & 63).astype(np.uint64)
    packed = np.zeros(total // 64 + 2, np.uint64)
    if values.size:
        first = np.append(0, (word[1:] != word[:-1]).nonzero()[0] + 1)
        packed[word[first]] = np.bitwise_or.reduceat(values << shift, first)
        over = ((starts & 63) + widths > 64).nonzero()[0]
        packed[word[over] + 1] |= values[over] >> (np.uint64(64) - shift[over])
    return packed.astype("<u8").tobytes()[: (total + 7) // 8]


def unpack_fields(data: bytes | memoryview, widths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The fields, uint64 ``[n]``; ``data`` may be longer than they are, and counts as followed by zeros."""
    ends = np.cumsum(widths)
    starts = ends - widths
    total = int(ends[-1]) if ends.size else 0
    padded = np.zeros(total // 64 * 8 + 16, np.uint8)
    given = np.frombuffer(data, np.uint8)[: padded.size]
    padded[: given.size] = given
    packed = padded.view("<u8").astype(np.uint64)
    word, shift = starts >> 6, (starts & 63).astype(np.uint64)
    joined = packed[word] >> shift | packed[word + 1] << np.uint64(1) << (np.uint64(63) - shift)
    fields: NDArray[np.uint64] = joined & ((np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1))
    return fields
