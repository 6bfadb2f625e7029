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

# How far whole models of different architectures lie from the sums of their layers, each measured alone: the standard
# deviation of the logarithms over six architectures, 0.052 to 0.057 in four runs of benchmarks/thor_end_to_end.py.
ARCHITECTURE_SPREAD = 0.055
_KNOWN_FREEDOM = 5  # degrees of freedom that this spread counts as, beside those of the anchors at hand
_DISAGREE = 3.0  # anchors that lie so many times further apart than that are worth a note

if TYPE_CHECKING:
    from collections.abc import Sequence

_CORRECTS_NOTHING = " corrects nothing: "
_DISAGREE_BY = " disagree by "

# Student's t over the normal distribution's, two-sided 90 %, for 5, 6, ... degrees of freedom.
_T_OVER_Z = (1.23, 1.18, 1.15, 1.13, 1.11, 1.10, 1.09)


def factor_of(log_ratios: Sequence[float]) -> tuple[float, float]:
    """The factor for another model, and its relative standard error, from log(measured / predicted) of anchors.

    The factor is their geometric mean. Its error is that of one more draw from the same population, since the next
    model is of another architecture than the anchors. The population's spread is pooled from that of the anchors and
    that of the architectures known (a scaled inverse chi-square prior: Gelman et al., Bayesian Data Analysis, 3.3),
    widened for the mean being a mean of few and by Student's t for the spread being one of few.
    """
    count = len(log_ratios)
    squares = statistics.variance(log_ratios) * (count - 1) if count > 1 else 0.0
    freedom = _KNOWN_FREEDOM + count - 1
    spread = math.sqrt((_KNOWN_FREEDOM * ARCHITECTURE_SPREAD**2 + squares) / freedom)
    few = _T_OVER_Z[min(count - 1, len(_T_OVER_Z) - 1)]
    return math.exp(statistics.fmean(log_ratios)), spread * math.sqrt(1 + 1 / count) * few


def anchored(profile: Profile) -> Profile:
    """The profile with a factor per quantity, set by its metered models, which are listed in ``wholes``.

    A model with a kind of layer that was never fitted sets no factor, and a note says so.
    """
    factor: dict[Quantity, float] = {}
    error: dict[Quantity, float] = {}
    wholes: list[Whole] = []
    ours = (_CORRECTS_NOTHING, _DISAGREE_BY)
    notes = dict.fromkeys(note for note in profile.notes if not any(text in note for text in ours))
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
            if max(ratios) - min(ratios) > _DISAGREE * ARCHITECTURE_SPREAD:
                notes[
                    f"anchors{_DISAGREE_BY}{math.exp(max(ratios) - min(ratios)) - 1:.0%} in {quantity}: give anchors "
                    "as large as the models that are to be predicted, or profile longer"
                ] = None
    return msgspec.structs.replace(profile, factor=factor, factor_error=error, wholes=wholes, notes=list(notes))
