"""How many updates a round needs: a share of the plan's target while the loss falls, all of it once it stalls.

Early changes of a model are much alike from device to device, so few updates say as much as many, for less energy;
the noise of few only matters near the end. Whenever ``stall_rounds`` rounds have closed, the mean of their losses (the
median of a round's updates, so that no single device rules it) is compared with that of as many rounds before: fallen
by less than ``stall_gain`` of it, the share grows by ``share_step``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.scheduling.draws import median
from coordinator.scheduling.table import LARGEST_LOSS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.scheduling.base import Outcome


def share_now(memory: Mapping[str, float], options: Mapping[str, float]) -> float:
    """The share of the plan's target that the next round asks for, ``first_share`` to 1."""
    return memory.get("share", options["first_share"])


def note_round(outcomes: Sequence[Outcome], memory: dict[str, float], options: Mapping[str, float]) -> None:
    """Adds a closed round to ``memory``, and moves the share when a window of rounds is full."""
    share = share_now(memory, options)
    losses = [
        outcome.meta.loss_rms for outcome in outcomes if outcome.meta is not None and outcome.meta.loss_rms is not None
    ]
    known = np.array([loss for loss in losses if 0.0 <= loss <= LARGEST_LOSS], float)
    if share >= 1.0 or not len(known):
        return
    memory["stall_loss"] = memory.get("stall_loss", 0.0) + median(known, 0.0)
    memory["stall_count"] = memory.get("stall_count", 0.0) + 1.0
    if memory["stall_count"] < options["stall_rounds"]:
        return
    now, before = memory["stall_loss"], memory.get("stall_before")
    memory.update(stall_before=now, stall_loss=0.0, stall_count=0.0)
    if before is not None and now > (1.0 - options["stall_gain"]) * before:
        memory["share"] = min(1.0, share + options["share_step"])
