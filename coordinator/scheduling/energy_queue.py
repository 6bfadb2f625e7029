"""The virtual energy queue: what a device has drawn for a run beyond its share of what the fleet draws.

After every round each device's queue becomes ``Q <- max(0, Q + E * [was asked] - e)``: ``E`` are the joules of its
job, ``e`` the share of a round that is everyone's (the idea of CAFE, after Neely's drift plus penalty). A job that
failed, was cancelled or whose update was refused costs as one that counted, only what the device declined is free. A
device with a long queue scores ``1 / (1 + Q / V)``, so nobody pays for long. Without a budget, ``e`` is what the round
drew over the number of devices that the run knows.

A round must not write a row for every device. So what is stored is ``queue_j = Q + e_1 + ... + e_t`` up to the last
round ``t`` that the device was asked in. As ``Q`` only shrinks between, ``max(0, queue_j - (e_1 + ... + e_now))`` is
exactly the queue of now, and only those who were asked change. The sum is kept in the selector's memory, and so are
the failed jobs until the next model is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.scheduling.draws import Column, median

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.events import HistoryRow
    from coordinator.scheduling.base import Outcome

SPENT = "spent_share_j"  # in a selector's memory: the sum of all e
FAILED = "failed "  # and a device: the steps of its jobs that failed since the last round was closed
_MOST = 16.0  # times the round's median: what is claimed beyond is taken for that


def queue_now(stored_j: Column, memory: Mapping[str, float]) -> Column:
    """The queues of now, joules, out of ``HistoryRow.queue_j``."""
    return np.maximum(stored_j - memory.get(SPENT, 0.0), 0.0)


def next_queue(stored_j: float, drawn_j: float, before_j: float, share_j: float) -> float:
    """``queue_j`` after a round in which the device drew ``drawn_j``, ``before_j`` and ``share_j`` as in the module."""
    queue = max(0.0, stored_j - before_j)
    return max(0.0, queue + drawn_j - share_j) + before_j + share_j


def note_ended(device: str, outcome: Outcome, memory: dict[str, float]) -> None:
    """Remembers a failed job until the round is closed; an update that counts after all pays for itself."""
    if outcome.meta is None:
        memory[FAILED + device] = memory.get(FAILED + device, 0.0) + float(outcome.assignment.steps or 0)
    else:
        memory.pop(FAILED + device, None)


def close_round(
    outcomes: Sequence[Outcome], histories: Mapping[str, HistoryRow], memory: dict[str, float], budget_j: float
) -> list[str]:
    """Moves the queues of those who were asked, and the sum; gives their names.

    Args:
        outcomes: of the updates that the round took; those who failed are in ``memory``.
        histories: whose ``queue_j`` changes.
        memory: of the selector.
        budget_j: joules per round and device that are free; 0: the round's own share.
    """
    jobs = [
        (outcome.assignment.device, _joules(outcome, histories)) for outcome in outcomes if outcome.meta is not None
    ]
    for key in [key for key in memory if key.startswith(FAILED)]:
        device = key.removeprefix(FAILED)
        jobs.append((device, _estimate(histories.get(device), memory.pop(key))))
    drawn = np.array([joules for _, joules in jobs], float)
    usual = median(drawn, 0.0)
    drawn = np.clip(np.nan_to_num(drawn, nan=usual), 0.0, _MOST * usual)
    share = budget_j or float(drawn.sum()) / max(len(histories), 1)
    before = memory.get(SPENT, 0.0)
    memory[SPENT] = before + share
    changed = []
    for (device, _), joules in zip(jobs, drawn.tolist(), strict=True):
        history = histories.get(device)
        if history is not None:
            history.queue_j = next_queue(history.queue_j, joules, before, share)
            changed.append(device)
    return sorted(set(changed))


def _joules(outcome: Outcome, histories: Mapping[str, HistoryRow]) -> float:
    """Of one job: as the device said, else by the history's joules per step; NaN: unknown."""
    meta = outcome.meta
    if meta is None:
        return float("nan")
    if meta.energy is not None and meta.energy.train_mj is not None:
        return min(float(meta.energy.train_mj), 1e18) / 1000.0
    return _estimate(histories.get(outcome.assignment.device), meta.steps)


def _estimate(history: HistoryRow | None, steps: float) -> float:
    """By the joules per step that the run knows; NaN: unknown, or the job's steps are (0)."""
    if not steps or history is None or history.step_j is None or not 0.0 <= history.step_j <= 1e15:
        return float("nan")
    return history.step_j * steps
