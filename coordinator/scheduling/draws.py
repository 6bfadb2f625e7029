"""Seeded draws by weight, and the robust statistics that keep one device's numbers from ruling them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from random import Random

Column: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Rows: TypeAlias = npt.NDArray[np.intp]

LEAST_WEIGHT = 1e-6  # of the greatest one: nobody's chance is zero


def uniforms(random: Random, count: int) -> Column:
    """Numbers in (0, 1], float64 ``[count]``; the same for the same seed on every machine."""
    bits = np.frombuffer(random.randbytes(8 * count), "<u8") >> np.uint64(11)
    return np.asarray((bits + np.uint64(1)) * 2.0**-53, np.float64)


def draw(random: Random, rows: Rows, weights: Column, count: int) -> Rows:
    """``count`` of ``rows`` without replacement, each next one in proportion to its weight; all if they are fewer.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: those with the smallest ``-ln(u) / w``.
    Weights are finite and not negative, and as many as rows; equal ones give a uniform draw.
    """
    keys = -np.log(uniforms(random, len(rows))) / _floored(weights)
    return rows[smallest(keys, count)]


def smallest(keys: Column, count: int) -> Rows:
    """Positions of the ``count`` smallest keys, ascending; linear in the number of keys."""
    count = max(0, min(count, len(keys)))
    if count == 0:
        return np.zeros(0, np.intp)
    first = np.argpartition(keys, count - 1)[:count] if count < len(keys) else np.arange(len(keys))
    return first[np.lexsort((first, keys[first]))]


def chances(weights: Column, count: int) -> Column:
    """About how likely :func:`draw` takes each: ``count * w / sum(w)``, at most 1."""
    if not len(weights):
        return weights
    floored = _floored(weights)
    return np.asarray(np.minimum(1.0, max(count, 0) * floored / floored.sum()))


def _floored(weights: Column) -> Column:
    greatest = weights.max(initial=0.0)
    return np.maximum(weights / greatest, LEAST_WEIGHT) if greatest > 0.0 else np.ones(len(weights))


def quantile(values: Column, share: float) -> float:
    """The quantile of the values that are not NaN, rounded down to one of them; NaN if there is none.

    So for ``share`` < 1 the greatest of two or more values never sets it: one device that lies cannot move a bound
    beyond what another one says.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan")
    place = int(share * (len(known) - 1))
    return float(np.partition(known, place)[place])


def median(values: Column, default: float) -> float:
    """The lower median of the values that are not NaN; ``default`` if there is none."""
    middle = quantile(values, 0.5)
    return default if np.isnan(middle) else middle


def filled(values: Column, default: float) -> Column:
    """Unknown (NaN) values replaced by the median of the known ones; by ``default`` if none is known."""
    unknown = np.isnan(values)
    return np.where(unknown, median(values, default), values) if unknown.any() else values


def clipped(values: Column, share: float = 0.95) -> Column:
    """No value above the quantile: "clip to the 95 % value of the distribution" (Oort, section 4.2). NaN stays."""
    bound = quantile(values, share)
    return values if np.isnan(bound) else np.minimum(values, bound)


def spread(values: Column) -> Column:
    """From 0 for the least to 1 for the greatest; all 0 if they are equal."""
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    return (values - low) / (high - low) if high > low else np.zeros(len(values))
