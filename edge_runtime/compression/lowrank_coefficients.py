"""Entropy coding of quantised factors: small whole numbers, most of them 0.

Every vector of coefficients has one of 32 tables: a probability of 0 and a geometric distribution of the magnitudes
above it; the tables are those that code factors of real updates in the fewest bits. Magnitudes from 15 on are escaped:
the number of bits, then the bits. Signs and escaped bits are uniform and stand together at the end of the stream, where
they cost little time.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.compression.rans import Model
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.rans import Decoder, Encoder

ESCAPE = 15
LIMIT = (1 << 13) - 1  # largest magnitude; the bound that keeps the product of factors exact rests on it
_ORDER = 3  # of the exponential-Golomb code of what exceeds ESCAPE
_TABLES = (  # probability of 0 of 4096, and of a magnitude above 0 to be larger than any of them, of 256
    *((60, 245), (217, 212), (317, 160), (457, 120), (899, 110), (899, 136), (899, 170), (1214, 94)),
    *((1214, 136), (1214, 186), (1585, 46), (1585, 76), (1585, 110), (1991, 34), (1991, 60), (1991, 94)),
    *((1991, 136), (2401, 24), (2401, 44), (2401, 76), (2401, 140), (2784, 9), (2784, 24), (2784, 46)),
    *((2784, 94), (3115, 4), (3115, 20), (3115, 60), (3385, 1), (3385, 160), (3855, 60), (4078, 128)),
)
TABLE_BITS = 5


@lru_cache(maxsize=len(_TABLES))
def table(index: int) -> Model:
    """The model of the magnitudes ``0 .. 15`` (15: escaped) with this number, ``0 .. 31``."""
    zero, ratio = _TABLES[index]
    rest = (4096 - zero) << 16
    weights = [zero << 16]
    for _ in range(1, ESCAPE):
        part = rest * (256 - ratio) >> 8
        weights.append(max(part, 1))
        rest -= part
    return Model([*weights, max(rest, 1)])


@cache
def _costs() -> NDArray[np.float32]:
    """Bits float32 ``[16, 32]`` of a magnitude with its sign, under each table."""
    costs = np.stack([table(index).costs for index in range(len(_TABLES))], 1)
    costs[1:] += 1.0
    costs[ESCAPE] += 4.0  # the number of bits of an escaped one
    return costs.astype(np.float32)


def best_tables(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For whole numbers ``[k, n]``: bits of each vector with its table's name, and the table, both ``[k]``."""
    count, size = vectors.shape
    magnitudes = np.abs(vectors)
    large = magnitudes >= ESCAPE
    symbols = np.minimum(magnitudes, ESCAPE).astype(np.int64)
    symbols += (np.arange(count) << 4)[:, None]
    counts = np.bincount(symbols.reshape(-1), minlength=count << 4).reshape(count, 16)
    costs = counts.astype(np.float32) @ _costs()
    tables = costs.argmin(1)
    bits = costs[np.arange(count), tables].astype(np.float64) + (TABLE_BITS if size else 0)
    if counts[:, ESCAPE].any():
        extra = np.zeros_like(magnitudes)
        extra[large] = np.frexp(magnitudes[large] - (ESCAPE - (1 << _ORDER)))[1] - 1
        bits += extra.sum(1)
    return bits, tables


class CoefficientWriter:
    """Writes vectors of coefficients into a stream; :meth:`finish` writes signs and escaped bits."""

    def __init__(self, stream: Encoder) -> None:
        self._stream = stream
        self._vectors: list[NDArray[np.int64]] = []

    def write(self, vector: NDArray[np.int64], index: int) -> None:
        """Whole numbers ``[n]``, magnitudes up to LIMIT, under the table ``index``."""
        self._stream.raw(index, TABLE_BITS)
        self._stream.symbols(table(index), np.minimum(np.abs(vector), ESCAPE))
        self._vectors.append(vector)

    def finish(self) -> None:
        """What belongs to the vectors and is not yet written."""
        if not self._vectors:
            return
        values = np.concatenate(self._vectors)
        values = values[values != 0]
        over = np.abs(values)
        over = over[over >= ESCAPE] - ESCAPE + (1 << _ORDER)
        widths = np.frexp(over.astype(np.float64))[1].astype(np.int64) - 1
        self._stream.raws(widths - _ORDER, np.full(widths.size, 4))
        self._stream.raws(over - (1 << widths), widths)
        self._stream.raws(values < 0, np.ones(values.size, np.int64))


class CoefficientReader:
    """Reads what :class:`CoefficientWriter` wrote; work is bounded by the sizes that are asked for."""

    def __init__(self, stream: Decoder) -> None:
        self._stream = stream
        self._vectors: list[list[int]] = []

    def read(self, size: int) -> int:
        """Reads the magnitudes of a vector; the number under which :meth:`finish` gives its values."""
        index = self._stream.raw(TABLE_BITS)
        self._vectors.append(self._stream.symbols(table(index), size))
        return len(self._vectors) - 1

    def finish(self) -> list[NDArray[np.float64]]:
        """All vectors, whole numbers in float64.

        Raises:
            CodecError: a magnitude above LIMIT.
        """
        if not self._vectors:
            return []
        sizes = [len(vector) for vector in self._vectors]
        values = np.concatenate([np.array(vector, np.int64) for vector in self._vectors])
        large = np.flatnonzero(values == ESCAPE)
        if large.size:
            widths = self._stream.raws(np.full(large.size, 4)).astype(np.int64) + _ORDER
            if widths.max() > LIMIT.bit_length():
                raise CodecError("a coefficient of a low-rank update is too large")
            values[large] += self._stream.raws(widths).astype(np.int64) + (1 << widths) - (1 << _ORDER)
            if values.max() > LIMIT:
                raise CodecError("a coefficient of a low-rank update is too large")
        present = np.flatnonzero(values)
        negative = self._stream.raws(np.ones(present.size, np.int64)) != 0
        values[present[negative]] *= -1
        return np.split(values.astype(np.float64), np.cumsum(sizes)[:-1])
