"""Oort's pacer: how slow a device may be before its score suffers, by what rounds have brought of late.

Lai et al., OSDI 2021, section 4.2 (trade of statistical and system efficiency). The limit is a percentile of the
seconds of all candidates, as in the released code. Whenever ``pacer_rounds`` rounds have closed, the sum of their
utilities is compared with that of as many rounds before: within 10 % of it, the percentile grows by ``pacer_step``, so
that slower devices with other data come in; five times it or more away, the percentile shrinks by as much.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from coordinator.scheduling.draws import Column, clipped, quantile
from coordinator.scheduling.table import LARGEST_LOSS, LARGEST_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.scheduling.base import Outcome

_FLAT = 0.1
_SWING = 5.0


def allowed_s(seconds: Column, memory: Mapping[str, float], options: Mapping[str, float]) -> float:
    """Seconds that cost no score: the percentile of ``seconds`` that is due; infinite at 100."""
    percentile = memory.get("percentile", options["percentile"])
    return math.inf if percentile >= 100.0 else quantile(seconds, percentile / 100.0)


def note_round(outcomes: Sequence[Outcome], memory: dict[str, float], options: Mapping[str, float]) -> None:
    """Adds a closed round to ``memory``, and moves the percentile when a window of rounds is full."""
    memory["window_utility"] = memory.get("window_utility", 0.0) + _utility(outcomes, options["clip"])
    memory["window_rounds"] = memory.get("window_rounds", 0.0) + 1.0
    if memory["window_rounds"] < options["pacer_rounds"]:
        return
    now, before = memory["window_utility"], memory.get("window_before")
    memory.update(window_before=now, window_utility=0.0, window_rounds=0.0)
    if before is None:
        return
    percentile, step = memory.get("percentile", options["percentile"]), options["pacer_step"]
    if abs(now - before) <= _FLAT * before:
        memory["percentile"] = min(100.0, percentile + step)
    elif abs(now - before) >= _SWING * before:
        memory["percentile"] = max(min(step, percentile), percentile - step)


def _utility(outcomes: Sequence[Outcome], clip: float) -> float:
    """Of a round: the sum over its updates of samples times rms loss, clipped as the scores are."""
    known = [
        min(outcome.meta.samples, LARGEST_SAMPLES) * outcome.meta.loss_rms
        for outcome in outcomes
        if outcome.meta is not None
        and outcome.meta.loss_rms is not None
        and 0.0 <= outcome.meta.loss_rms <= LARGEST_LOSS
    ]
    return float(clipped(np.array(known, float), clip).sum()) if known else 0.0
