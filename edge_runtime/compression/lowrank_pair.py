"""Predicts the update of two dense layers in a row from the weights that both ends already hold.

For ``h = relu(W x + b)``, ``y = V h + c`` and the error ``e = dL/dy`` of a sample, back-propagation gives

    dL/dW = ((V^T e) * [h > 0]) x^T        dL/dV = e h^T = e relu(W x + b)^T

so for a known ``W`` and ``V`` little is new in an update of the wide layers ``W`` ``[n, d]`` and ``V`` ``[o, n]``: a
few directions ``x`` with their errors ``e``. The sender writes

    M = C X^T    ``[o, d]``: errors times inputs, of low rank: whole numbers C ``[o, r]`` and X ``[d, r]``
    t            ``[8]``: share of samples for which a unit is active, by the rank of its value ``W x1`` for the first x
    D            ``[o, 2 o + 1]``: weights of the features relu(W M^T), relu(-W M^T) and 1

and both ends compute dW ~ (t * V^T C) X^T and dV ~ D F^T. Biases are the last column of their matrix. All of it is
done in whole numbers held in float64, far below 2**53: no rounding, so the order of summation cannot matter.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.float64]

RANK = 8
MAX_OUTPUTS = 64
MIN_UNITS = 256  # with fewer, the factors of the two layers cost no more than the code of the pair
BUCKETS = 8
LEVEL_BITS = 4
INPUT_LIMIT = (1 << 10) - 1
FACTOR_BITS = 10
_WEIGHT_BITS = 13


class PairCode(NamedTuple):
    """What is sent of a pair: whole numbers X ``[d, r]``, C ``[o, r]``, D ``[o, 2 o + 1]``, t ``[8]``."""

    inputs: Integers
    errors: Integers
    outputs: Integers
    levels: NDArray[np.int64]


def as_integers(weights: NDArray[np.float32]) -> Integers:
    """Weights times a power of two, rounded to whole numbers of at most 13 bits."""
    peak = float(max(weights.max(), -weights.min())) if weights.size else 0.0
    if not peak:
        return np.zeros(weights.shape)
    exponent = _WEIGHT_BITS - math.frexp(peak)[1]
    scaled = np.ldexp(weights, exponent)  # exact, but for what is far below 1
    return np.rint(scaled, out=scaled).astype(np.float64)


def normalise(values: Integers, bits: int) -> Integers:
    """Values times one power of two, rounded to whole numbers of magnitude up to ``2**bits``."""
    peak = float(np.abs(values).max()) if values.size else 0.0
    if not peak:
        return values
    scaled = values * math.ldexp(1.0, bits - math.frexp(peak)[1])
    return np.rint(scaled, out=scaled)


def buckets(first: Integers, weights: Integers) -> NDArray[np.int64]:
    """Bucket ``0 .. 7`` of each unit ``[n]`` by the rank of its response to the first input direction ``[d]``."""
    response = weights @ first
    order = np.argsort(response, kind="stable")
    out = np.empty(order.size, np.int64)
    out[order] = np.arange(order.size) * BUCKETS // order.size
    return out


def backward(levels: NDArray[np.int64], bucket: NDArray[np.int64], after: Integers) -> Integers:
    """``t * V^T``, whole numbers ``[n, o]``, from V ``[o, n]``."""
    return normalise(after.T * levels[bucket][:, None], _WEIGHT_BITS)


def features(weights: Integers, inputs: Integers, errors: Integers) -> Integers:
    """``relu(+-W M^T)`` and the constant for the bias, whole numbers ``[n + 1, 2 o + 1]``, columns of like size."""
    response = normalise(weights @ inputs[:-1], 24) @ errors.T
    units, outputs = response.shape
    out = np.zeros((units + 1, 2 * outputs + 1))
    np.maximum(response, 0.0, out=out[:-1, :outputs])
    np.maximum(-response, 0.0, out=out[:-1, outputs:-1])
    out[-1, -1] = 1.0
    exponents = np.frexp(out.max(0))[1]
    scaled: Integers = np.ldexp(out, FACTOR_BITS - exponents[None, :])
    return np.rint(scaled, out=scaled)


def first_layer(code: PairCode, bucket: NDArray[np.int64], after: Integers) -> Integers:
    """Left factor ``[n, r]`` of dW; the right one is X."""
    return normalise(backward(code.levels, bucket, after) @ code.errors, FACTOR_BITS)


def predict(code: PairCode, weights: Integers, after: Integers) -> list[tuple[Integers, Integers]]:
    """Left and right factors of the augmented dW ``[n, d + 1]`` and dV ``[o, n + 1]``, of at most 10 bits."""
    bucket = buckets(code.inputs[:-1, 0], weights)
    left = first_layer(code, bucket, after)
    return [(left, code.inputs), (code.outputs, features(weights, code.inputs, code.errors))]
