"""The low-rank payload: what it holds, and how that is written and read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.lowrank_coefficients import CoefficientReader, CoefficientWriter
from edge_runtime.compression.lowrank_pair import BUCKETS, FACTOR_BITS, LEVEL_BITS, RANK, PairCode
from edge_runtime.compression.lowrank_parts import parts
from edge_runtime.compression.lowrank_product import PAIR_GAIN_BITS, PAIR_SHIFT
from edge_runtime.compression.rans import Decoder, Encoder
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout
    from edge_runtime.compression.lowrank_parts import Matrix

GAIN_BITS = 4
LEAST_GAIN = -13
RANK_BITS = 6
EXPONENT_BITS, MANTISSA_BITS = 9, 7
PAIR_RANK_BITS, PAIR_SHIFT_BITS = 4, 5
_EXPONENT_BIAS = 200


class Component(NamedTuple):
    """Whole numbers ``u`` ``[rows]`` and ``v`` ``[width]`` with their tables; gain in 1/32 of the nominal one."""

    u: NDArray[np.float64]
    v: NDArray[np.float64]
    u_table: int
    v_table: int
    gain: int


class CodedPair(NamedTuple):
    """A pair's code, tables of X (per column), C, D's own features and D's other ones, gains (mantissa, shift)."""

    code: PairCode
    tables: tuple[int, ...]
    gains: tuple[tuple[int, int], ...]


class Content(NamedTuple):
    """All that a payload holds: step, per pair its code, per matrix its components, per chunk numbers and table."""

    step: float
    pairs: list[CodedPair | None]
    components: list[list[Component]]
    chunks: list[tuple[NDArray[np.float64], int] | None]


def rounded_step(step: float, exponent: int) -> float:
    """``step * 2**exponent`` as precisely as a payload holds it."""
    fraction, own = math.frexp(step)
    mantissa = round(math.ldexp(fraction, MANTISSA_BITS + 1))
    return math.ldexp(mantissa, min(max(own + exponent, 1 - _EXPONENT_BIAS), 300) - MANTISSA_BITS - 1)


def write(content: Content) -> bytes:
    """The payload."""
    stream = Encoder()
    stream.raw(1, 1)
    fraction, exponent = math.frexp(content.step)
    stream.raw(exponent + _EXPONENT_BIAS, EXPONENT_BITS)
    stream.raw(round(math.ldexp(fraction, MANTISSA_BITS + 1)) - (1 << MANTISSA_BITS), MANTISSA_BITS)
    writer = CoefficientWriter(stream)
    for coded in content.pairs:
        stream.raw(0 if coded is None else coded.code.inputs.shape[1], PAIR_RANK_BITS)
        if coded is not None:
            for level in coded.code.levels:
                stream.raw(int(level), LEVEL_BITS)
            for mantissa, shift in coded.gains:
                stream.raw(mantissa, PAIR_GAIN_BITS)
                stream.raw(shift, PAIR_SHIFT_BITS)
            own, rest = split_outputs(coded.code.outputs)
            vectors = [*coded.code.inputs.T, coded.code.errors.reshape(-1), own, rest]
            for vector, index in zip(vectors, coded.tables, strict=True):
                writer.write(vector.astype(np.int64), index)
    for components in content.components:
        stream.raw(len(components), RANK_BITS)
        for part in components:
            stream.raw(part.gain - LEAST_GAIN, GAIN_BITS)
            writer.write(part.u.astype(np.int64), part.u_table)
            writer.write(part.v.astype(np.int64), part.v_table)
    for chunk in content.chunks:
        stream.raw(int(chunk is not None), 1)
        if chunk is not None:
            writer.write(chunk[0].astype(np.int64), chunk[1])
    writer.finish()
    return stream.finish()


def read(payload: bytes | memoryview, layout: Layout) -> Content | None:
    """What a payload holds, checked; None for an update of zeros.

    Raises:
        CodecError: it is damaged or belongs to another layout.
    """
    plan = parts(layout)
    stream = Decoder(payload)
    if not stream.raw(1):
        stream.finish()
        return None
    exponent = stream.raw(EXPONENT_BITS) - _EXPONENT_BIAS
    step = math.ldexp((1 << MANTISSA_BITS) + stream.raw(MANTISSA_BITS), exponent - MANTISSA_BITS - 1)
    reader = CoefficientReader(stream)
    pairs = [_read_pair(stream, reader, plan.matrices[index], plan.matrices[index + 1]) for index in plan.pairs]
    components = []
    for matrix in plan.matrices:
        count = stream.raw(RANK_BITS)
        if count > matrix.rank:
            raise CodecError(f"a low-rank update has {count} components where {matrix.rank} are possible")
        components.append(
            [
                (stream.raw(GAIN_BITS) + LEAST_GAIN, reader.read(matrix.rows), reader.read(matrix.width))
                for _ in range(count)
            ]
        )
    chunks = [reader.read(size) if stream.raw(1) else None for _, size, _ in plan.chunks]
    vectors = reader.finish()
    stream.finish()
    content = Content(
        step,
        [None if pair is None else pair(vectors) for pair in pairs],
        [[Component(vectors[u], vectors[v], 0, 0, gain) for gain, u, v in listed] for listed in components],
        [None if number is None else (vectors[number], 0) for number in chunks],
    )
    if any(not part.u.any() for listed in content.components for part in listed):
        raise CodecError("a component of a low-rank update is empty")
    return content


def _read_pair(
    stream: Decoder, reader: CoefficientReader, one: Matrix, two: Matrix
) -> Callable[[list[NDArray[np.float64]]], CodedPair] | None:
    rank = stream.raw(PAIR_RANK_BITS)
    if not rank:
        return None
    if rank > RANK:
        raise CodecError(f"a pair of layers has {rank} input directions, at most {RANK} are possible")
    levels = np.array([stream.raw(LEVEL_BITS) for _ in range(BUCKETS)])
    gains = tuple((stream.raw(PAIR_GAIN_BITS), stream.raw(PAIR_SHIFT_BITS)) for _ in range(2))
    if any(shift > PAIR_SHIFT for _, shift in gains):
        raise CodecError("the gain of a pair of layers is too large")
    outputs = two.rows
    inputs = [reader.read(one.width) for _ in range(rank)]
    errors = reader.read(outputs * rank)
    own, rest = reader.read(2 * outputs), reader.read(outputs * (2 * outputs - 1))

    def build(vectors: list[NDArray[np.float64]]) -> CodedPair:
        x, c = np.stack([vectors[number] for number in inputs], 1), vectors[errors].reshape(outputs, rank)
        d = join_outputs(vectors[own], vectors[rest], outputs)
        if max(np.abs(x).max(), np.abs(c).max(), np.abs(d).max()) >= 1 << FACTOR_BITS:
            raise CodecError("a coefficient of a pair of layers is too large")
        return CodedPair(PairCode(x, c, d, levels), (), gains)

    return build


def _own(outputs: int) -> NDArray[np.bool_]:
    """Which weights ``[o, 2 o + 1]`` belong to an output's own features: those are seldom 0."""
    mask = np.zeros((outputs, 2 * outputs + 1), np.bool_)
    index = np.arange(outputs)
    mask[index, index] = True
    mask[index, index + outputs] = True
    return mask


def split_outputs(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weights of the outputs' own features and all others."""
    mask = _own(len(weights))
    return weights[mask], weights[~mask]


def join_outputs(own: NDArray[np.float64], rest: NDArray[np.float64], outputs: int) -> NDArray[np.float64]:
    """The inverse of :func:`split_outputs`."""
    mask = _own(outputs)
    weights = np.empty(mask.shape)
    weights[mask] = own
    weights[~mask] = rest
    return weights
