"""The grid of a run: the model that all devices hold, on numbers that add up exactly everywhere.

With a lossy downlink, every device must end at the same bits, whatever its processor and whichever way it came: by the
chain of changes, or by a snapshot. So the shared model lives on a grid: each tensor's values are whole multiples of a
power of two, chosen once from the run's initial parameters. Rounding a change to the grid and adding it are exact or
correctly rounded single operations, and a snapshot is the multiples themselves, entropy coded: a quantised model that
is the shared model, not an approximation of it. What rounding leaves over stays at the coordinator (error feedback).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.compression.container import Header, pack, read_varint, unpack, varint
from edge_runtime.compression.pipeline import MODEL_CHANNEL
from edge_runtime.compression.symbols import pack_symbols, unpack_symbols
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Vector

SNAPSHOT = 16  # stands for a snapshot where a container names its codec
GRID_BITS = 10  # steps from zero to the largest initial value of a tensor: 2**10
BUFFER_BITS = 18  # running statistics are few and worth more
_EXPONENT_RANGE = (-60, 60)
_LARGEST = 2**30  # steps: folded to whole numbers they fit 32 bits
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4"}  # bytes of a multiple
_BYTE = 256


class SharedModel:
    """The model all devices hold: float32 ``[layout.size]`` on the grid, with the grid.

    Args:
        vector: float32 ``[layout.size]``, on the grid.
        exponents: int8 ``[tensors]``; values of tensor ``i`` are multiples of ``2 ** exponents[i]``.
        layout: of the vector.
    """

    __slots__ = ("_layout", "exponents", "vector")

    def __init__(self, vector: Vector, exponents: NDArray[np.int8], layout: Layout) -> None:
        self.vector = vector
        self.exponents = exponents
        self._layout = layout

    @classmethod
    def start(cls, initial: Vector, layout: Layout) -> SharedModel:
        """Version 0: the initial parameters, float32 ``[layout.size]``, on the grid that they define."""
        exponents = _exponents(initial, layout)
        return cls(_snap(initial, exponents, layout), exponents, layout)

    def plus(self, change: Vector) -> SharedModel:
        """The next version: ``change``, float32 ``[layout.size]``, rounded to the grid and added.

        Raises:
            CodecError: the sum leaves the range of the grid.
        """
        vector = self.vector + _snap(change, self.exponents, self._layout)
        if not np.isfinite(vector).all():
            raise CodecError("the shared model left the range of float32; lower the learning rates")
        return SharedModel(vector, self.exponents, self._layout)

    def sha256(self) -> str:
        """Hash of the little-endian float32 vector."""
        return hashlib.sha256(np.ascontiguousarray(self.vector, "<f4").data.cast("B")).hexdigest()

    def encode(self) -> bytes:
        """The snapshot: a container of exponents and multiples.

        Raises:
            CodecError: a value has grown to more than 2**30 steps.
        """
        multiples = np.empty(self._layout.size, np.int64)
        for exponent, (_, _, start, end) in zip(self.exponents.tolist(), self._layout.spans(), strict=True):
            exact = np.ldexp(self.vector[start:end].astype(np.float64), -exponent)
            if np.abs(exact).max(initial=0) > _LARGEST:
                raise CodecError("a value has grown beyond the grid of the run; lower the learning rates")
            multiples[start:end] = exact
        parts = [self.exponents.tobytes()]
        for buffers in (True, False):
            parts += _pack_multiples(multiples[_rows(self._layout, buffers=buffers)])
        return pack(Header(codec=SNAPSHOT), {MODEL_CHANNEL: self._layout}, [parts])

    @classmethod
    def decode(cls, data: bytes | memoryview, layout: Layout) -> SharedModel:
        """The model of a snapshot.

        Raises:
            CodecError: no snapshot, damaged, or of other tensors.
        """
        header, sections = unpack(data, {MODEL_CHANNEL: layout})
        if header.codec != SNAPSHOT:
            raise CodecError(f"no snapshot of a model, but codec {header.codec!r}")
        ((start, end),) = sections.values()
        section = memoryview(data)[start:end]
        at = len(layout.names)
        exponents = np.frombuffer(section[:at], np.int8)
        if len(exponents) != at or ((exponents < _EXPONENT_RANGE[0]) | (exponents > _EXPONENT_RANGE[1])).any():
            raise CodecError("snapshot is cut off or has an impossible grid")
        multiples = np.empty(layout.size, np.int64)
        for buffers in (True, False):
            rows = _rows(layout, buffers=buffers)
            multiples[rows], at = _unpack_multiples(section, at, len(rows))
        if at != len(section):
            raise CodecError(f"{len(section) - at} bytes follow the snapshot")
        vector = np.empty(layout.size, np.float32)
        for exponent, (_, _, first, last) in zip(exponents.tolist(), layout.spans(), strict=True):
            vector[first:last] = np.ldexp(multiples[first:last].astype(np.float64), exponent)
        return cls(vector, exponents, layout)


def _rows(layout: Layout, *, buffers: bool) -> NDArray[np.int64]:
    """Positions of the buffers, or of all else: they are coded apart, since their steps differ so much."""
    chosen = [np.arange(start, end) for name, _, start, end in layout.spans() if (name in layout.buffers) == buffers]
    return np.concatenate([np.empty(0, np.int64), *chosen])


def _pack_multiples(multiples: NDArray[np.int64]) -> list[bytes]:
    """Bytes of a multiple, then planes of bytes of equal significance, the lowest first, each with its length."""
    largest = int(np.abs(multiples).max(initial=0))
    folded = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples)  # small, whatever the sign
    width = next(width for width, dtype in _WIDTHS.items() if 2 * largest <= np.iinfo(dtype).max)
    planes = folded.astype(_WIDTHS[width]).view(np.uint8).reshape(-1, width).T
    packed = [pack_symbols(np.ascontiguousarray(plane), _BYTE) for plane in planes]
    return [bytes([width]), *(part for plane in packed for part in (varint(len(plane)), plane))]


def _unpack_multiples(section: memoryview, at: int, count: int) -> tuple[NDArray[np.int64], int]:
    """The inverse, ``[count]``, and the place behind it."""
    if at >= len(section) or section[at] not in _WIDTHS:
        raise CodecError("snapshot is cut off or of an unknown width")
    width, at = section[at], at + 1
    planes = np.empty((count, width), np.uint8)
    for place in range(width):
        length, at = read_varint(section, at, len(section), len(section) - at)
        planes[:, place] = unpack_symbols(section[at : at + length], _BYTE, count)
        at += length
    folded = planes.view(_WIDTHS[width]).reshape(count).astype(np.int64)
    return np.where(folded & 1, -(folded >> 1) - 1, folded >> 1), at


def _exponents(initial: Vector, layout: Layout) -> NDArray[np.int8]:
    found: list[int | None] = []
    for name, _, start, end in layout.spans():
        largest = np.abs(initial[start:end]).max(initial=0)
        bits = BUFFER_BITS if name in layout.buffers else GRID_BITS
        found.append(int(np.frexp(largest)[1]) - bits if largest > 0 else None)
    known = [exponent for exponent in found if exponent is not None]
    finest = min(known, default=-16)  # tensors that begin at zero move by as little as any other
    chosen = [finest if exponent is None else exponent for exponent in found]
    return np.clip(np.array(chosen, np.int64), *_EXPONENT_RANGE).astype(np.int8)


def _snap(vector: Vector, exponents: NDArray[np.int8], layout: Layout) -> Vector:
    """Nearest points of the grid, ties to even: exact scaling by a power of two, one rounding, exact scaling back."""
    out = np.empty(layout.size, np.float32)
    for exponent, (_, _, start, end) in zip(exponents.tolist(), layout.spans(), strict=True):
        steps = np.rint(vector[start:end].astype(np.float64) * 2.0**-exponent)
        out[start:end] = steps * 2.0**exponent + 0.0  # never -0.0, which a snapshot could not tell from 0.0
    return out
