"""One bit per value, unbiased: the signs after a random rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.compression.packing import SEED_MASK, pack_bits, random_bits, unpack_bits
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector

_BLOCK = 1 << 13
_LEAST = 64
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Eden(Codec):
    """Signs of the values after a randomised Hadamard transform, with a scale that makes the mean right.

    Vargaftik et al., "DRIVE: one-bit distributed mean estimation", NeurIPS 2021: the unbiased scale ``|x|^2 / |Rx|_1``
    with the structured (Hadamard) rotation; their EDEN (ICML 2022) with one bit is the same. The rotation is drawn per
    encoding from ``Request.seed``, so devices must have different seeds; averaging many updates then averages the error
    away, and error feedback is off unless asked for. The vector is rotated in blocks of 8192, its tail in smaller
    powers of two.

    The receiver's rotation is of signs, so it is a sum of whole numbers, exact in int16, and each result is one
    float32 product: every machine gets the same bits.

    Payload: u32 seed, float32 scale per block, the bits; nothing if there are no elements.
    """

    name: ClassVar[str] = "eden"
    number: ClassVar[int] = 12
    feedback: ClassVar[bool] = False

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """1 bit per element; the budget is not kept to."""
        seed = request.seed & SEED_MASK
        groups = list(_groups(layout.size))
        if not groups:
            return Encoded(b"", Update(values), state)
        flips = _flips(seed, groups)
        bits, scales = np.empty(flips.size, np.uint8), np.empty(sum(group.rows for group in groups), "<f4")
        vector = np.empty(layout.size, np.float32)
        for group in groups:
            rows = np.zeros((group.rows, group.width), np.float32)
            rows.reshape(-1)[: group.stop - group.start] = values[group.start : group.stop]
            peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1))
            rows /= np.where(peaks > 0, peaks, 1)[:, None]  # so that nothing overflows
            flip = group.of(flips)
            rotated = _hadamard(rows * flip)
            negative = (rotated < 0).astype(np.uint8)
            bits[group.first_bit : group.first_bit + flip.size] = negative.reshape(-1)
            whole = _hadamard(1 - 2 * negative.astype(np.int16)) * flip
            scale = peaks.astype(np.float64) * np.square(rows, dtype=np.float64).sum(axis=1)
            scale /= np.maximum(np.abs(rotated).sum(axis=1, dtype=np.float64), 1e-300)
            scale = np.minimum(scale, 0.999999 * _FLOAT32_MAX / np.maximum(1, np.abs(whole).max(axis=1)))
            scales[group.first_row : group.first_row + group.rows] = scale
            group.put(vector, whole, scales)
        return Encoded(seed.to_bytes(4, "little") + scales.tobytes() + pack_bits(bits), Update(vector), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Dense."""
        groups = list(_groups(layout.size))
        if not groups:
            if len(payload):
                raise CodecError(f"{len(payload)} bytes for no numbers")
            return Update(np.empty(0, np.float32))
        split = 4 + 4 * sum(group.rows for group in groups)
        if len(payload) < split:
            raise CodecError(f"{len(payload)} bytes do not hold the scales")
        bits = unpack_bits(payload[split:], sum(group.rows * group.width for group in groups))
        flips = _flips(int.from_bytes(payload[:4], "little"), groups)
        scales = np.frombuffer(payload[4:split], "<f4")
        vector = np.empty(layout.size, np.float32)
        for group in groups:
            whole = _hadamard(1 - 2 * group.of(bits).astype(np.int16)) * group.of(flips)
            group.put(vector, whole, scales)
        return Update(vector)


class _Group(NamedTuple):
    """Blocks of one width that stand beside each other, ``rows`` of them, for elements ``start`` to ``stop``."""

    start: int
    stop: int
    rows: int
    width: int
    first_row: int
    first_bit: int

    def of(self, flat: NDArray[Any]) -> NDArray[Any]:
        """The group's part of an array with a number per bit, ``[rows, width]``."""
        return flat[self.first_bit : self.first_bit + self.rows * self.width].reshape(self.rows, self.width)

    def put(self, vector: Vector, whole: NDArray[np.int16], scales: NDArray[np.float32]) -> None:
        """Puts ``whole * scale`` into its place."""
        scale = scales[self.first_row : self.first_row + self.rows].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = whole.astype(np.float32) * scale[:, None]
        vector[self.start : self.stop] = scaled.reshape(-1)[: self.stop - self.start]


def _groups(size: int) -> Iterator[_Group]:
    start = row = bit = 0
    while start < size:
        left = size - start
        width = min(_BLOCK, 1 << (left.bit_length() - 1 if left >= _LEAST else (left - 1).bit_length()))
        rows = max(1, left // width)
        stop = min(size, start + rows * width)
        yield _Group(start, stop, rows, width, row, bit)
        start, row, bit = stop, row + rows, bit + rows * width


def _flips(seed: int, groups: list[_Group]) -> NDArray[np.int16]:
    """Random signs, int16 +1 and -1, one per bit."""
    return 1 - 2 * random_bits(seed, sum(group.rows * group.width for group in groups)).astype(np.int16)


def _hadamard(rows: NDArray[Any]) -> NDArray[Any]:
    """Each row ``[n]`` times the Hadamard matrix of order n, a power of two; n stages of equal shape (Pease 1968)."""
    for _ in range(rows.shape[1].bit_length() - 1):
        even, odd = rows[:, ::2], rows[:, 1::2]
        rows = np.concatenate([even + odd, even - odd], axis=1)
    return rows
