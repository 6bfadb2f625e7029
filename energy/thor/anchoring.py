"""The factor between whole models and the sums of their layers, from whole models that were metered."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import msgspec

from energy.errors import ProfileError
from energy.thor.estimate import Estimator
from energy.thor.layers import LayerSpec
from energy.thor.profile import Profile, Quantity, Whole

# How far whole models of different architectures lie from the sums of their layers, as a standard deviation of
# logarithms: the median over six runs of benchmarks/thor_end_to_end.py (0.041 to 0.118).
ARCHITECTURE_SPREAD = 0.065

if TYPE_CHECKING:
    from collections.abc import Sequence

_CORRECTS_NOTHING = " corrects nothing: "

# Student's t over the normal distribution's, two-sided 90 %, for 1, 2, ... degrees of freedom.
_T_OVER_Z = (3.84, 1.78, 1.43, 1.30, 1.23, 1.18, 1.15, 1.13, 1.11)


def factor_of(log_ratios: Sequence[float]) -> tuple[float, float]:
    """The factor for another model, and its relative standard error, from log(measured / predicted) of anchors.

    The factor is their geometric mean. Its error is that of one more draw from the same population, since the next
    model is of another architecture than the anchors: their spread, widened for the mean being a mean of few and by
    Student's t for the spread being one of few; at least that of the architectures known, which is all that one
    anchor can tell.
    """
    count = len(log_ratios)
    draw = math.sqrt(1 + 1 / count)
    least_error = ARCHITECTURE_SPREAD * draw
    if count < 2:
        return math.exp(log_ratios[0]), least_error
    few = _T_OVER_Z[min(count - 2, len(_T_OVER_Z) - 1)]
    return math.exp(statistics.fmean(log_ratios)), max(least_error, statistics.stdev(log_ratios) * draw * few)


def anchored(profile: Profile) -> Profile:
    """The profile with a factor per quantity, set by its metered models, which are listed in ``wholes``.

    A model with a kind of layer that was never fitted sets no factor, and a note says so.
    """
    factor: dict[Quantity, float] = {}
    error: dict[Quantity, float] = {}
    wholes: list[Whole] = []
    notes = dict.fromkeys(note for note in profile.notes if _CORRECTS_NOTHING not in note)
    for quantity in sorted({name for model in profile.metered for name in model.costs}):
        if not any(quantity in family.fitted for family in profile.families):
            continue
        estimator = Estimator(msgspec.structs.replace(profile, factor={}, factor_error={}), quantity)
        ratios = []
        for model in profile.metered:
            if quantity not in model.costs:
                continue
            layers = [LayerSpec(layer.name, layer.kind, layer.sizes, layer.calls) for layer in model.layers]
            try:
                found = estimator.estimate(layers)
            except ProfileError as cause:
                notes[f"{model.model}{_CORRECTS_NOTHING}{cause}"] = None
                continue
            measured = model.costs[quantity]
            ratios.append(math.log(measured / found.total))
            wholes.append(
                Whole(
                    model=model.model,
                    quantity=quantity,
                    batch=model.batch,
                    measured=measured,
                    predicted=found.total,
                    low=found.low,
                    high=found.high,
                    anchor=True,
                )
            )
        if ratios:
            factor[quantity], error[quantity] = factor_of(ratios)
    return msgspec.structs.replace(profile, factor=factor, factor_error=error, wholes=wholes, notes=list(notes))
