"""The factor between whole models and the sums of their layers, from whole models that were metered."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import msgspec

from energy.errors import ProfileError
from energy.estimate import Estimator
from energy.profile import Profile, Quantity, Whole

# How far whole models of different architectures lie from the sums of their layers, as benchmarks/thor_end_to_end.py
# measured it: 4 to 5 % of their cost.
ONE_ANCHOR_ERROR = 0.05

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from energy.layers import LayerSpec


# Student's t over the normal distribution's, two-sided 90 %, for 1, 2, ... degrees of freedom.
_T_OVER_Z = (3.84, 1.78, 1.43, 1.30, 1.23, 1.18, 1.15, 1.13, 1.11)


def factor_of(log_ratios: Sequence[float], least_error: float = ONE_ANCHOR_ERROR) -> tuple[float, float]:
    """The factor for another model, and its relative standard error, from log(measured / predicted) of anchors.

    The factor is their geometric mean. Its error is that of one more draw from the same population, since the next
    model is of another architecture than the anchors: their spread, widened for the mean being a mean of few and by
    Student's t for the spread being one of few; at least ``least_error``, which is all that one anchor can tell.
    """
    count = len(log_ratios)
    if count < 2:
        return math.exp(log_ratios[0]), least_error
    few = _T_OVER_Z[min(count - 2, len(_T_OVER_Z) - 1)]
    spread = statistics.stdev(log_ratios) * math.sqrt(1 + 1 / count) * few
    return math.exp(statistics.fmean(log_ratios)), max(least_error, spread)


def anchored(
    profile: Profile,
    layers: Mapping[str, list[LayerSpec]],
    costs: Mapping[str, Mapping[Quantity, float]],
    batch: int,
) -> Profile:
    """The profile with a factor per quantity, and the models that set it in ``wholes``.

    A model with a kind of layer that was never fitted sets no factor, and a note says so.
    """
    factor: dict[Quantity, float] = {}
    error: dict[Quantity, float] = {}
    wholes: list[Whole] = []
    notes: dict[str, None] = {}
    for quantity in sorted({name for costs_of in costs.values() for name in costs_of}):
        if not any(quantity in family.fitted for family in profile.families):
            continue
        estimator = Estimator(msgspec.structs.replace(profile, factor={}, factor_error={}), quantity)
        ratios = []
        for name, measured in costs.items():
            if quantity not in measured:
                continue
            try:
                found = estimator.estimate(layers[name])
            except ProfileError as cause:
                notes[f"{name} corrects nothing: {cause}"] = None
                continue
            ratios.append(math.log(measured[quantity] / found.total))
            wholes.append(
                Whole(
                    model=name,
                    quantity=quantity,
                    batch=batch,
                    measured=measured[quantity],
                    predicted=found.total,
                    low=found.low,
                    high=found.high,
                    anchor=True,
                )
            )
        if not ratios:
            continue
        factor[quantity], error[quantity] = factor_of(ratios)
    return msgspec.structs.replace(
        profile, factor=factor, factor_error=error, wholes=wholes, notes=[*profile.notes, *notes]
    )
