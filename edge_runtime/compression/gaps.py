"""Gaps between the entries of a sparse vector: their classes, and laws of how often each class comes."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANTISSA_BITS = 2
CLASSES = 200
"""Classes of gaps: values below 4 are their own class, above it each octave has four."""

_SHAPES = (16, 12, 10, 8, 6, 4, 3)  # Weibull exponents in sixteenths
_SCALES = 44  # of the Weibull laws: half octaves, the first at a quarter
_PATTERN_OF_ZERO = 1024 << MANTISSA_BITS


def class_base(classes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Smallest value of each class, and how many raw bits choose among its values."""
    width = np.maximum((classes >> MANTISSA_BITS) - 1, 0)
    mantissa = (classes & ((1 << MANTISSA_BITS) - 1)) + (1 << MANTISSA_BITS)
    return np.where(classes >= 1 << MANTISSA_BITS, mantissa << width, classes), width


def to_classes(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class of each value >= 0 (exponential-Golomb with two bits of mantissa), and its number of raw bits."""
    # exponent and two bits of mantissa of a float64 are the class of what is at least 4; exact below 2**53
    pattern = values.astype(np.float64).view(np.int64)
    classes = np.where(values < 1 << MANTISSA_BITS, values, (pattern >> 52 - MANTISSA_BITS) - _PATTERN_OF_ZERO)
    return classes, np.maximum((classes >> MANTISSA_BITS) - 1, 0)


@lru_cache(maxsize=1024)
def class_count(size: int) -> int:
    """Classes of values below ``size``."""
    return int(to_classes(np.array([max(size - 1, 0)], np.int64))[0][0]) + 1


def expected_gaps(count: int, size: int) -> int:
    """Row of the bank for the gaps of ``count`` hits among ``size`` places of which no more is known."""
    ratio = (size + 1) // (count + 1)
    return _SCALES + min(_SCALES - 1, (ratio * ratio).bit_length() + 3)


@lru_cache(maxsize=1)
def bank() -> NDArray[np.int64]:
    """Weights ``[law, class]``: differences of ``exp(-(gap / scale) ** shape)``, in 40 bits."""
    one = 1 << 40
    # exp(-2**(j / 16)): sixteen values near 1 by their series, squared for each further octave
    powers = [1 << 60]
    for _ in range(4):
        powers = [value for low, high in pairwise([*powers, 2 * powers[0]]) for value in (low, math.isqrt(low * high))]
    decay = []
    for power in powers:
        x = power >> 36  # 2**(j / 16 - 16) in 40 bits
        decay.append(one - x + (x * x >> 41) - x * x * x // (6 << 80))
    for at in range(40 * 16):
        decay.append(decay[at] * decay[at] >> 40)
    survival = np.array(decay, np.int64)
    base = class_base(np.arange(CLASSES))[0]
    places = np.array([((value + 1) ** 16).bit_length() - 1 for value in base.tolist()])  # floor(16 * log2(value + 1))
    scales = 8 * (np.arange(_SCALES) - 4)
    steps = np.array(_SHAPES)[:, None, None] * (places[None, None, :] - scales[None, :, None]) // 16
    alive = survival[np.clip(steps + 16 * 16, 0, survival.size - 1)].reshape(-1, CLASSES)
    return np.maximum(alive - np.append(alive[:, 1:], np.zeros((len(alive), 1), np.int64), axis=1), one >> 13)
