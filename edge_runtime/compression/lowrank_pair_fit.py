"""The sender's side of :mod:`edge_runtime.compression.lowrank_pair`: fits the code of a pair to an update.

Floating point and linear algebra are free here: what counts is the whole numbers that are sent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.lowrank_coefficients import best_tables
from edge_runtime.compression.lowrank_factors import quantise
from edge_runtime.compression.lowrank_pair import (
    BUCKETS,
    INPUT_LIMIT,
    LEVEL_BITS,
    RANK,
    PairCode,
    backward,
    buckets,
    features,
    first_layer,
    normalise,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.lowrank_pair import Integers

    Matrix = NDArray[np.float32]
    Square = NDArray[np.float64]

_COEFFICIENT_BITS = 7.0  # what a coefficient of C or D costs about, with its sign
_ERROR_LIMIT = 255
_MOVES = 300
_FINER = 0.75  # step of X relative to that of factors: its errors enter both layers
_EPSILON = 1e-9


class FittedPair(NamedTuple):
    """The code, the factors that it predicts and their gains, per layer."""

    code: PairCode
    factors: list[tuple[Integers, Integers]]
    gains: list[float]


def fit_pair(
    first: Matrix, second: Matrix, weights: tuple[Integers, Integers], step: float, price: float
) -> FittedPair | None:
    """The code of a pair for the augmented updates ``[n, d + 1]`` and ``[o, n + 1]``; None if none pays.

    Args:
        first: update of the first layer, its bias as last column.
        second: update of the second layer.
        weights: W ``[n, d]`` and V ``[o, n]``, whole numbers.
        step: quantisation step of the factors.
        price: squared error that one bit must save.
    """
    before, after = weights
    fitted = _directions(first, before, after)
    if fitted is None:
        return None
    scales, directions, levels = fitted
    inputs = quantise(directions * scales.astype(np.float32)[:, None], step * _FINER)
    inputs = np.clip(inputs, -INPUT_LIMIT, INPUT_LIMIT)
    bits, _ = best_tables(inputs)
    outputs = len(second)
    pays = (scales**2 > price * (bits + _COEFFICIENT_BITS * outputs)) & inputs.any(1)
    rank = int(pays.argmin()) if not pays.all() else len(pays)
    if not rank or not inputs[0, :-1].any():
        return None
    x = inputs[:rank].T.astype(np.float64)
    x[:, 0] *= 1.0 if x[:-1, 0].sum() >= 0 else -1.0

    bucket = buckets(x[:-1, 0], before)
    left = backward(levels, bucket, after).astype(np.float32)
    right = x.astype(np.float32)
    target = left.T @ (first @ right)
    gram_left, gram_right = _gram(left), _gram(right)
    unit = step / 2 / math.sqrt(max(np.diag(gram_left).mean() * np.diag(gram_right).mean(), 1e-300))
    errors = _closest(target.astype(np.float64), gram_left, gram_right, unit, price * _COEFFICIENT_BITS)
    errors = np.clip(errors, -_ERROR_LIMIT, _ERROR_LIMIT)
    if not errors.any():
        return None

    basis = features(before, x, errors)
    flat = basis.astype(np.float32)
    gram = _gram(flat)
    norms = np.diag(gram)
    unit = step / math.sqrt(norms[norms > 0].mean())
    identity = np.eye(outputs)
    weighted = _closest((second @ flat).astype(np.float64), identity, gram, unit, price * _COEFFICIENT_BITS)
    code = PairCode(x, errors, np.clip(weighted, -INPUT_LIMIT, INPUT_LIMIT), levels)
    factors = [(first_layer(code, bucket, after), x), (code.outputs, basis)]
    gains = [_gain(update, *pair) for update, pair in zip((first, second), factors, strict=True)]
    return FittedPair(code, factors, gains)


def _directions(
    first: Matrix, weights: Integers, after: Integers
) -> tuple[NDArray[np.float64], Matrix, NDArray[np.int64]] | None:
    """Singular values ``[r]`` and input directions ``[r, d + 1]`` of the fitted M, and the levels t."""
    levels = np.arange(BUCKETS) + 1  # more active units learn more: a start from which two rounds suffice
    left = normalise(after.T, 13)
    outputs = len(after)
    for last in (False, False, True):
        flat = left.astype(np.float32)
        gram = _gram(flat)
        trace = float(np.trace(gram))
        if not trace:
            return None
        root = np.linalg.cholesky(gram + np.eye(outputs) * (trace / outputs * _EPSILON))
        target = (flat.T @ first).astype(np.float64)
        whitened = np.linalg.solve(root, target)
        values, vectors = np.linalg.eigh(whitened @ whitened.T)
        count = min(RANK, outputs)
        scales = np.sqrt(np.maximum(values[::-1][:count], 0.0))
        if not scales[0] > 0:
            return None
        rotation = vectors[:, ::-1][:, :count]
        rows = rotation.T @ whitened  # scales * directions
        if last:
            safe = np.maximum(scales, scales[0] * 1e-12)
            return scales, (rows / safe[:, None]).astype(np.float32), levels
        lead = rows[0, :-1] * (1.0 if rows[0, :-1].sum() >= 0 else -1.0)
        bucket = buckets(normalise(lead, 10), weights)
        few = min(3, count)
        model = np.linalg.solve(root.T, rotation[:, :few] @ rows[:few])  # M [o, d + 1]
        levels = _levels(after, model, first, bucket, levels)
        left = backward(levels, bucket, after)
    return None


def _levels(
    after: Integers, model: Square, first: Matrix, bucket: NDArray[np.int64], levels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Least-squares gain of each bucket, as whole numbers up to 15."""
    flat = after.T.astype(np.float32)
    score = np.einsum("ij,ij->i", flat, first @ model.T.astype(np.float32))
    size = np.einsum("ij,ij->i", flat @ (model @ model.T).astype(np.float32), flat)
    total = np.bincount(bucket, size, BUCKETS)
    gain = np.maximum(np.bincount(bucket, score, BUCKETS) / np.maximum(total, 1e-300), 0.0)
    peak = gain.max()
    return np.rint(gain * ((1 << LEVEL_BITS) - 1) / peak).astype(np.int64) if peak > 0 else levels


def _closest(target: Square, left: Square, right: Square, unit: float, price: float) -> Square:
    """Whole numbers K that make ``|Y - unit L K R^T|^2 + price * (number of K != 0)`` small.

    Takes the best change of a single coefficient again and again.

    Args:
        target: ``L^T Y R``.
        left: ``L^T L``.
        right: ``R^T R``.
        unit: value of 1.
        price: what a coefficient must save that is not 0.
    """
    out = np.zeros_like(target)
    slope = target * unit
    curve = np.outer(np.diag(left), np.diag(right)) * unit * unit + 1e-300
    for _ in range(_MOVES):
        move = np.rint(slope / curve)
        gain = move * (2 * slope - move * curve) - price * ((out == 0) & (move != 0))
        at = int(gain.argmax())
        if gain.flat[at] <= 0:
            break
        row, column = divmod(at, out.shape[1])
        change = move[row, column]
        out[row, column] += change
        slope -= np.outer(left[:, row] * (unit * unit * change), right[column])
    return out


def _gram(matrix: Matrix) -> Square:
    product: Square = (matrix.T @ matrix).astype(np.float64)
    return product


def _gain(update: Matrix, left: Integers, right: Integers) -> float:
    a, b = left.astype(np.float32), right.astype(np.float32)
    size = float((_gram(a) * _gram(b)).sum())
    return float(np.einsum("ij,ij->", update @ b, a, dtype=np.float64)) / size if size else 0.0
