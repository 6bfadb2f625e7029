"""A bound on what a device may claim of itself, taken from what the others of its round say."""

from __future__ import annotations

import math
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def most(claims: Iterable[float], cap: float) -> float:
    """``cap`` times the median of a round's claims, of an even number the lower one; infinite where ``cap`` is 0.

    So of two claims the smaller decides, and one claim alone is bound by nothing but itself.
    """
    return cap * median_low(claims) if cap else math.inf
