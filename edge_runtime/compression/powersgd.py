"""PowerSGD: low-rank factors of each matrix, found by one power iteration per round."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.compression.half import from_half, to_half
from edge_runtime.compression.packing import random_words
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Value, Vector

MAX_RANK = 32  # bounds what a decoder works per element
_FLOAT32_MAX = np.finfo(np.float32).max


class PowerSgd(Codec):
    """Each matrix M (a kernel as output channels x rest) as P Q^T with ``rank`` columns, float16.

    Vogels et al., "PowerSGD: practical low-rank gradient compression for distributed optimization", NeurIPS 2019,
    algorithms 1 and 2: P = orthonormal(M Q), Q = M^T P, begun with the Q of the last round (warm start), which is the
    codec's state. Tensors that two factors would not make smaller travel as float16. Under a budget the rank is the
    largest that fits, whatever the option.

    The product is summed column by column with elementwise float32 operations, not by a matrix library, so every
    machine gets the same bits.

    Payload: a byte for the rank, then per tensor: exponent (int8) and float16 values; or exponents of M and Q, P, Q.
    Nothing if there are no elements.
    """

    name: ClassVar[str] = "powersgd"
    number: ClassVar[int] = 15
    keeps_budget: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Value]] = {"rank": 4}

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options.

        Raises:
            CodecError: the rank is not from 1 to 32.
        """
        super().__init__(options)
        if not 1 <= int(self.options["rank"]) <= MAX_RANK:
            raise CodecError(f"option 'rank' is {self.options['rank']}; it must be from 1 to {MAX_RANK}")

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """Dense; keeps to the budget.

        Raises:
            CodecError: the budget is below that of rank 1, or the state is of another layout.
        """
        if not layout.size:
            return Encoded(b"", Update(values), state)
        rank = self._rank(layout, request.budget_bytes)
        parts = [bytes([rank])]
        vector = np.empty(layout.size, np.float32)
        after: State = {}
        for piece in _pieces(layout, rank):
            part = values[piece.start : piece.stop]
            if not piece.rank:
                exponent, halves = to_half(part)
                parts += [_exponents(exponent), halves.tobytes()]
                vector[piece.start : piece.stop] = from_half(exponent, halves)
                continue
            peak = float(max(part.max(), -part.min()))
            scale = max(-126, math.frexp(peak)[1]) if peak else 0
            scale = min(scale, 126)
            matrix = part.reshape(piece.rows, piece.columns) * np.float32(2.0**-scale)
            start = _warm(state.get(f"q{piece.tensor}"), piece)
            left = np.linalg.qr(matrix @ start)[0]
            right = matrix.T @ left
            after[f"q{piece.tensor}"] = right
            halves_left = np.ascontiguousarray(left, "<f2")
            exponent, halves_right = to_half(np.ascontiguousarray(right))
            parts += [_exponents(scale, exponent), halves_left.tobytes(), halves_right.tobytes()]
            vector[piece.start : piece.stop] = _product(halves_left, halves_right, scale, exponent)
        return Encoded(b"".join(parts), Update(vector), after)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Dense; the rank alone says how long the payload must be."""
        if not layout.size:
            if len(payload):
                raise CodecError(f"{len(payload)} bytes for no numbers")
            return Update(np.empty(0, np.float32))
        rank = payload[0] if len(payload) else 0
        if not 1 <= rank <= MAX_RANK or len(payload) != _payload_bytes(layout, rank):
            raise CodecError(f"{len(payload)} bytes are not what a rank of {rank} takes")
        vector = np.empty(layout.size, np.float32)
        at = 1
        for piece in _pieces(layout, rank):
            end = at + piece.payload_bytes
            kept = 2 if piece.rank else 1
            exponents = np.frombuffer(payload[at : at + kept], np.int8).tolist()
            halves = np.frombuffer(payload[at + kept : end], "<f2")
            if piece.rank:
                left = halves[: piece.rows * piece.rank].reshape(piece.rows, piece.rank)
                right = halves[piece.rows * piece.rank :].reshape(piece.columns, piece.rank)
                vector[piece.start : piece.stop] = _product(left, right, *exponents)
            else:
                vector[piece.start : piece.stop] = from_half(exponents[0], halves)
            at = end
        return Update(vector)

    def _rank(self, layout: Layout, budget: int | None) -> int:
        if budget is None:
            return int(self.options["rank"])
        fitting = [rank for rank in range(1, MAX_RANK + 1) if _payload_bytes(layout, rank) <= budget]
        if not fitting:
            least = _payload_bytes(layout, 1)
            raise CodecError(f"a budget of {budget} bytes of payload is below the {least} of rank 1")
        return fitting[-1]


class _Piece(NamedTuple):
    """One tensor: where it stands, its sides as a matrix, and its rank; 0 if it travels as it is."""

    tensor: int
    start: int
    stop: int
    rows: int
    columns: int
    rank: int

    @property
    def payload_bytes(self) -> int:
        if self.rank:
            return 2 + 2 * self.rank * (self.rows + self.columns)
        return 1 + 2 * (self.stop - self.start)


def _pieces(layout: Layout, rank: int) -> Iterator[_Piece]:
    """The tensors that have elements."""
    for tensor, (_, shape, start, stop) in enumerate(layout.spans()):
        if start == stop:
            continue
        rows = shape[0] if shape else 1
        columns = (stop - start) // rows
        smaller = rank * (rows + columns) < rows * columns
        yield _Piece(tensor, start, stop, rows, columns, rank if smaller else 0)


def _payload_bytes(layout: Layout, rank: int) -> int:
    return 1 + sum(piece.payload_bytes for piece in _pieces(layout, rank))


def _warm(before: NDArray[np.float32] | None, piece: _Piece) -> NDArray[np.float32]:
    """Start of the iteration, float32 ``[columns, rank]``: the last Q, with noise for columns it lacks or has empty."""
    words = random_words(piece.tensor, piece.columns * piece.rank)
    noise = np.empty((piece.columns, piece.rank), np.float32)
    noise[:] = (words >> np.uint64(40)).reshape(noise.shape)
    noise *= np.float32(2.0**-23)
    noise -= np.float32(1)
    if before is not None:
        if before.ndim != 2 or len(before) != piece.columns:
            raise CodecError("the state of 'powersgd' is of another model; a change of bundle starts without state")
        used = np.flatnonzero(before[:, : piece.rank].any(axis=0))
        noise[:, used] = before[:, used]
    return noise


def _exponents(*exponents: int) -> bytes:
    return np.array(exponents, np.int8).tobytes()


def _product(left: NDArray[np.float16], right: NDArray[np.float16], scale: int, exponent: int) -> Vector:
    """``2^scale * left @ right.T`` as a vector, every operation and its order fixed; too large values saturate."""
    with np.errstate(over="ignore", invalid="ignore"):
        columns_left = left.astype(np.float32)
        columns_right = from_half(exponent, right)
        total = np.multiply.outer(columns_left[:, 0], columns_right[:, 0])
        for column in range(1, left.shape[1]):
            total += np.multiply.outer(columns_left[:, column], columns_right[:, column])
        total *= np.float32(2.0**scale)
        np.clip(total, -_FLOAT32_MAX, _FLOAT32_MAX, out=total)
    flat: Vector = total.reshape(-1)
    return flat
