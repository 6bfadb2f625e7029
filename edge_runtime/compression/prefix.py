"""Prefix codes: Huffman codes of a few symbols, and Elias's gamma code.

Huffman, "A method for the construction of minimum-redundancy codes", Proc. IRE 40/9, 1952; Elias, "Universal codeword
sets", IEEE Trans. Inf. Theory 21/2, 1975. Encoding is vectorised; Huffman codes are decoded by an automaton that takes
a byte a step, gamma codes have their unary parts together in front of the other bits.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.compression.bits import pack_fields, unpack_fields
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_SYMBOLS = 16


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Bits per symbol of a Huffman code; 1 for the only symbol. Counts above 0, from 1 to 16 of them."""
    if len(counts) == 1:
        return [1]
    heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts)]
    heapq.heapify(heap)
    lengths = [0] * len(counts)
    while len(heap) > 1:
        low, high = heapq.heappop(heap), heapq.heappop(heap)
        joined = low[2] + high[2]
        for symbol in joined:
            lengths[symbol] += 1
        heapq.heappush(heap, (low[0] + high[0], low[1], joined))
    return lengths


def _codewords(lengths: Sequence[int]) -> list[int]:
    """The canonical code: by length, then by symbol; raises CodecError unless it is complete."""
    code = last = 0
    words = [0] * len(lengths)
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths)):
        code <<= length - last
        words[symbol], last = code, length
        code += 1
    if not lengths or min(lengths) < 1 or code != 1 << last:
        raise CodecError("the lengths of a Huffman code do not fit together")
    return words


def encode_huffman(symbols: NDArray[np.int64], lengths: Sequence[int]) -> bytes:
    """Codewords of the symbols, ``[n]``, in bytes; the first bit of a codeword is the lowest."""
    words = [int(f"{word:0{length}b}"[::-1], 2) for word, length in zip(_codewords(lengths), lengths, strict=True)]
    return pack_fields(np.array(words, np.uint64)[symbols], np.array(lengths, np.int64)[symbols])


def decode_huffman(data: bytes | memoryview, lengths: Sequence[int], count: int) -> NDArray[np.uint8]:
    """The symbols, uint8 ``[count]``.

    Raises:
        CodecError: no such code, or the data does not hold exactly so many symbols.
    """
    if len(data) > count * max(lengths, default=0) // 8 + 1:
        raise CodecError("a Huffman code is longer than its symbols")
    table = _automaton(tuple(lengths))
    node = 0
    parts: list[bytes] = []
    append = parts.append
    for byte in bytes(data):
        node, symbols = table[node][byte]
        append(symbols)
    found = np.frombuffer(b"".join(parts), np.uint8)
    sizes = np.array(lengths, np.int64)
    if found.size < count:
        raise CodecError("a Huffman code is cut off")
    used = int(sizes[found[:count]].sum())
    if (used + 7) // 8 != len(data) or (used % 8 and data[-1] >> used % 8):
        raise CodecError("a Huffman code does not end where it should")
    return found[:count]


@lru_cache(maxsize=8)
def _automaton(lengths: tuple[int, ...]) -> list[list[tuple[int, bytes]]]:
    """Per inner node of the code tree and byte: the node behind the byte, and the symbols that are complete."""
    children: list[list[int]] = [[0, 0]]  # inner nodes; a leaf is -1 - symbol
    for symbol, (word, length) in enumerate(zip(_codewords(lengths), lengths, strict=True)):
        node = 0
        for at in range(length - 1, 0, -1):
            bit = word >> at & 1
            if not children[node][bit]:
                children[node][bit] = len(children)
                children.append([0, 0])
            node = children[node][bit]
        children[node][word & 1] = -1 - symbol
    table = []
    for start in range(len(children)):
        row = []
        for byte in range(256):
            node, symbols = start, []
            for at in range(8):
                node = children[node][byte >> at & 1]
                if node < 0:
                    symbols.append(-1 - node)
                    node = 0
            row.append((node, bytes(symbols)))
        table.append(row)
    return table


def encode_gamma(numbers: NDArray[np.int64]) -> tuple[bytes, bytes]:
    """Elias's gamma code of numbers from 1 to 2**53, ``[n]``: the unary parts, and the bits below the highest ones."""
    widths = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1
    unary = pack_fields(np.uint64(1) << widths.astype(np.uint64), widths + 1)
    return unary, pack_fields((numbers - (1 << widths)).astype(np.uint64), widths)


def gamma_bits(numbers: NDArray[np.int64]) -> int:
    """Length of the code."""
    return int(2 * np.frexp(numbers.astype(np.float64))[1].sum()) - numbers.size


def decode_gamma(data: memoryview, unary_bytes: int, count: int) -> tuple[NDArray[np.int64], int]:
    """The numbers, int64 ``[count]``, and how many bytes of ``data`` they took, of which ``unary_bytes`` are unary.

    Raises:
        CodecError: damaged or cut off.
    """
    if not 0 <= unary_bytes <= min(len(data), (count * 54 + 7) // 8):
        raise CodecError("a gamma code is cut off or too long")
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(data[:unary_bytes], np.uint8), bitorder="little"))
    if ones.size != count or unary_bytes != (int(ones[-1]) // 8 + 1 if count else 0):
        raise CodecError("a gamma code holds another number of values")
    widths = np.diff(ones, prepend=-1) - 1
    if count and widths.max() > 52:
        raise CodecError("a gamma code is out of range")
    end = unary_bytes + (int(widths.sum()) + 7) // 8
    if end > len(data):
        raise CodecError("a gamma code is cut off")
    low = unpack_fields(data[unary_bytes:end], widths).astype(np.int64)
    numbers: NDArray[np.int64] = (1 << widths) + low
    return numbers, end
