"""The factor between whole models and the sums of their layers, from whole models that were metered."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import msgspec

from energy.errors import ProfileError
from energy.estimate import Estimator
from energy.profile import Profile, Quantity, Whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from energy.layers import LayerSpec


def anchored(
    profile: Profile,
    layers: Mapping[str, list[LayerSpec]],
    costs: Mapping[str, Mapping[Quantity, float]],
    batch: int,
    least_error: float,
) -> Profile:
    """The profile with a factor per quantity, and the models that set it in ``wholes``.

    The factor is the geometric mean of measured over predicted; its error is the spread of these ratios, at least
    ``least_error``, which stands for what anchors of few architectures cannot tell.

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
        factor[quantity] = math.exp(statistics.fmean(ratios))
        spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        error[quantity] = max(least_error, spread)
    return msgspec.structs.replace(
        profile, factor=factor, factor_error=error, wholes=wholes, notes=[*profile.notes, *notes]
    )
