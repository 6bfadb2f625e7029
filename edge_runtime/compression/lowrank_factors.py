"""Factors of a matrix for the low-rank codec: truncated decomposition, rounding, and what each component saves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.lowrank_coefficients import LIMIT, best_tables
from edge_runtime.compression.lowrank_format import GAIN_BITS, LEAST_GAIN, Component
from edge_runtime.compression.lowrank_product import GAIN_CENTRE, NORM_BITS, unit_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_ROUNDING = 0.42  # 0.5 is to the nearest; less favours 0, which costs fewest bits
_RIDGE = 1e-7


class Factored(NamedTuple):
    """What is left of a matrix, ``[rows, width]``, and ``U s`` as rows ``[k, rows]``."""

    rest: Array
    left: Array


class Coded(NamedTuple):
    """Quantised components ``[k, rows]`` and ``[k, width]``, tables, rest times left; bits, squared error saved."""

    left: Array
    right: Array
    left_tables: NDArray[np.int64]
    right_tables: NDArray[np.int64]
    product: Array
    bits: NDArray[np.float64]
    saved: NDArray[np.float64]


def left_factor(matrix: Array, rank: int) -> Array:
    """Left singular vectors times singular values, as rows ``[k, rows]``, k up to ``rank``.

    Narrow matrices by the eigenvectors of the smaller Gram matrix; others by randomised subspace iteration (Halko,
    Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithm 4.4), with a fixed seed.
    """
    rows, columns = matrix.shape
    if rows <= 96:
        values, vectors = np.linalg.eigh((matrix @ matrix.T).astype(np.float64))
        scales = np.sqrt(np.maximum(values[::-1][:rank], 0.0))
        return np.ascontiguousarray((vectors[:, ::-1][:, :rank] * scales).T, np.float32)
    if columns <= 96:
        basis = np.eye(columns, dtype=np.float32)
    else:
        start = np.random.default_rng(0).standard_normal((columns, min(rank + 4, columns, rows)))
        basis = start.astype(np.float32)
        for _ in range(2):
            basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    image = matrix @ basis
    _, vectors = np.linalg.eigh((image.T @ image).astype(np.float64))
    return np.ascontiguousarray((image @ vectors[:, ::-1][:, :rank].astype(np.float32)).T)


def quantise(values: Array, step: float, offset: float = _ROUNDING) -> Array:
    """``values / step`` rounded to whole numbers of magnitude up to LIMIT; ``offset`` 0.5 is to the nearest."""
    scaled = np.abs(values)
    scaled *= np.float32(1 / step)
    scaled += np.float32(offset)
    np.floor(scaled, out=scaled)
    np.minimum(scaled, LIMIT, out=scaled)
    return np.copysign(scaled, values)


def code(matrix: Factored, step: float) -> Coded:
    """Rounds U s, then V s as the least-squares answer to the rounded U."""
    left = quantise(matrix.left, step)
    product = left @ matrix.rest
    gram = (left @ left.T).astype(np.float64)
    sizes = np.diag(gram).copy()
    gram[np.diag_indices_from(gram)] += np.where(sizes > 0, sizes * _RIDGE, 1.0)
    right = np.linalg.solve(gram, product.astype(np.float64)) * np.sqrt(sizes)[:, None]
    right = quantise(right.astype(np.float32), step)
    left_bits, left_tables = best_tables(left)
    right_bits, right_tables = best_tables(right)
    overlap = np.einsum("ij,ij->i", product, right, dtype=np.float64)
    power = sizes * np.einsum("ij,ij->i", right, right, dtype=np.float64)
    saved = overlap * np.abs(overlap) / np.maximum(power, 1e-300)
    return Coded(left, right, left_tables, right_tables, product, left_bits + right_bits + GAIN_BITS, saved)


def components(coded: Coded, chosen: NDArray[np.int64], step: float) -> list[Component]:
    """What is sent of a matrix, with least-squares gains."""
    if not chosen.size:
        return []
    left, right = coded.left[chosen].astype(np.float64), coded.right[chosen].astype(np.float64)
    gram = (left @ left.T) * (right @ right.T)
    aim = np.einsum("ij,ij->i", coded.product[chosen], right, dtype=np.float64)
    gram[np.diag_indices_from(gram)] *= 1 + _RIDGE
    gains = np.linalg.solve(gram, aim)
    out = []
    for index, u, v, gain in zip(chosen.tolist(), left, right, gains, strict=True):
        nominal = step * math.ldexp(unit_scale(u), -NORM_BITS)
        number = round(GAIN_CENTRE * gain / nominal) - GAIN_CENTRE
        number = min(max(number, LEAST_GAIN), LEAST_GAIN + (1 << GAIN_BITS) - 1)
        out.append(Component(u, v, int(coded.left_tables[index]), int(coded.right_tables[index]), number))
    return out
