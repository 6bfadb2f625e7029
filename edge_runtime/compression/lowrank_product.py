"""Rebuilds a low-rank update from its whole numbers, bit-identical on every machine.

Factors are whole numbers held in float64 and the sums of their products stay below 2**53, which is checked before:
every order of summation, with fused multiply-adds or without, gives the same bits. Two correctly rounded operations
follow: times the step, and to float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.compression.lowrank_pair import as_integers, predict
from edge_runtime.compression.lowrank_parts import parts
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Vector
    from edge_runtime.compression.lowrank_format import Content
    from edge_runtime.compression.lowrank_pair import Integers
    from edge_runtime.compression.lowrank_parts import Matrix, Parts

NORM_BITS = 22  # of 2**22 / |u|, the scale that makes u a unit vector
GAIN_CENTRE = 32
PAIR_GAIN_BITS, PAIR_SHIFT = 7, 17
_POINT = NORM_BITS + 5  # binary places of the products
_BLOCK = 1 << 18  # elements computed at a time


def unit_scale(u: NDArray[np.float64]) -> int:
    """``2**22 / |u|``, rounded down, for whole numbers u that are not all 0."""
    return math.isqrt((1 << (2 * NORM_BITS)) // int(np.dot(u, u)))


def pair_gain(gain: float, step: float) -> tuple[int, int] | None:
    """Mantissa ``0 .. 127`` and shift of ``gain / step`` in fixed point; None if it is out of range."""
    scaled = math.ldexp(gain / step, _POINT)
    one = 1 << PAIR_GAIN_BITS
    if not one <= scaled < (2 * one - 1) << PAIR_SHIFT:
        return None
    shift = math.frexp(scaled)[1] - PAIR_GAIN_BITS - 1
    mantissa = round(math.ldexp(scaled, -shift)) - one
    return (mantissa, shift) if mantissa < one else (0, shift + 1)


def pair_weights(layout: Layout, reference: Vector | None) -> list[tuple[Integers, Integers]]:
    """Of each pair the weights of both layers as whole numbers, without biases; nothing without a reference.

    Raises:
        CodecError: the reference is not finite float32 ``[layout.size]``.
    """
    plan = parts(layout)
    if reference is None:
        return []
    if reference.shape != (layout.size,) or reference.dtype != np.float32:
        raise CodecError(f"the reference of a low-rank update must be float32 ({layout.size},)")
    chosen = [[plan.matrices[index + at].view(reference) for at in range(2)] for index in plan.pairs]
    if not all(np.isfinite(weights).all() for both in chosen for weights in both):
        raise CodecError("the reference of a low-rank update is not finite")
    return [(as_integers(first), as_integers(second)) for first, second in chosen]


def rebuild(layout: Layout, content: Content, weights: list[tuple[Integers, Integers]]) -> Vector:
    """The update, float32 ``[layout.size]``.

    Args:
        layout: names and shapes.
        content: what was sent.
        weights: see :func:`pair_weights`.

    Raises:
        CodecError: a pair but no reference, or values above what float32 holds.
    """
    plan = parts(layout)
    factors = _factors(plan, content, weights)
    out = np.zeros(layout.size, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        for matrix, given in zip(plan.matrices, factors, strict=True):
            if given:
                _multiply(matrix, given, content.step, out)
        for (start, size, weight), chunk in zip(plan.chunks, content.chunks, strict=True):
            if chunk is not None:
                out[start : start + size] = chunk[0] * (content.step / weight) + 0.0
    if not np.isfinite(out).all():
        raise CodecError("a low-rank update holds values that float32 cannot")
    return out


def _factors(
    plan: Parts, content: Content, weights: list[tuple[Integers, Integers]]
) -> list[list[tuple[Integers, Integers]]]:
    """Left and right factors ``[rows, k]`` and ``[width, k]`` of each matrix, those of pairs first."""
    factors: list[list[tuple[Integers, Integers]]] = [[] for _ in plan.matrices]
    if any(content.pairs) and not weights:
        raise CodecError("this low-rank update needs the model that it was made against")
    for number, (index, coded) in enumerate(zip(plan.pairs, content.pairs, strict=True)):
        if coded is not None:
            predicted = predict(coded.code, *weights[number])
            for at, ((left, right), (mantissa, shift)) in enumerate(zip(predicted, coded.gains, strict=True)):
                factors[index + at].append((left * float(((1 << PAIR_GAIN_BITS) + mantissa) << shift), right))
    for given, components in zip(factors, content.components, strict=True):
        if components:
            scales = [float(unit_scale(part.u) * (GAIN_CENTRE + part.gain)) for part in components]
            left = np.stack([part.u * scale for part, scale in zip(components, scales, strict=True)], 1)
            given.append((left, np.stack([part.v for part in components], 1)))
    return factors


def _multiply(matrix: Matrix, factors: list[tuple[Integers, Integers]], step: float, out: Vector) -> None:
    left = np.concatenate([pair[0] for pair in factors], 1)
    right = np.concatenate([pair[1] for pair in factors], 1)
    bound = float((np.abs(left).max(0) * np.abs(right).max(0)).sum())
    if not bound < 2.0**53:
        raise CodecError("the factors of a low-rank update are too large")
    scale = math.ldexp(step / matrix.weight, -_POINT)
    values = matrix.view(out)
    rows = max(1, _BLOCK // matrix.width)
    for at in range(0, matrix.rows, rows):
        block = left[at : at + rows] @ right.T
        block *= scale
        block += 0.0  # no -0.0, which a sum may or may not give
        values[at : at + rows] = block[:, : matrix.columns]
        if matrix.bias >= 0:
            out[matrix.bias + at : matrix.bias + at + len(block)] = block[:, -1]
