"""The first selection of a round: which late updates will land in it, so that as many fewer need be asked for.

Abdelmoniem et al., "REFL: resource-efficient federated learning", EuroSys 2023, section 4.1: ``B_t`` are the late
updates expected within ``mu_t``, the moving average of the seconds that rounds last, ``mu_t = (1 - a) D + a mu`` with
``D`` of the round before and ``a`` = 0.25. When a round opened is kept in the selector's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.scheduling.base import RoundRequest

EARLIER_SHARE = 0.25  # of the moving average, that earlier rounds have: a


def opens_round(request: RoundRequest) -> bool:
    """Whether a round of a synchronous run begins: nobody was chosen for it before, as :func:`note_opened` was told."""
    synchronous = request.plan.participation.mode == "synchronous"
    return synchronous and request.attempt == 0 and request.memory.get("opened_round") != request.round


def note_opened(now: float, request: RoundRequest) -> None:
    """Remembers that somebody was chosen for this round, and how long rounds last."""
    if opens_round(request):
        lasts = round_s(now, request)
        if "opened_round" in request.memory:
            request.memory["round_s"] = lasts
        request.memory.update(opened_round=float(request.round), opened_unix_s=now)


def round_s(now: float, request: RoundRequest) -> float:
    """Seconds that rounds last, the one before this included; the plan's deadline while none is known.

    No round counts as longer than all its attempts: the coordinator was off, or its clock was set.
    """
    rules, memory = request.plan.participation, request.memory
    earlier = memory.get("round_s")
    rounds = request.round - memory.get("opened_round", float(request.round))
    if rounds <= 0:
        return rules.deadline_s if earlier is None else earlier
    last = min(max(0.0, now - memory["opened_unix_s"]) / rounds, rules.deadline_s * rules.attempts)
    return last if earlier is None else (1.0 - EARLIER_SHARE) * last + EARLIER_SHARE * earlier


def late_due(now: float, request: RoundRequest) -> int:
    """How many late updates are expected to land in the round that opens now.

    Those of jobs that are due within the time of a round by what their devices take, and not overdue by more than
    that. A device that never sent an update is expected at the deadline.
    """
    within, unknown = round_s(now, request), request.plan.participation.deadline_s
    return sum(
        abs((unknown if expected is None else expected) - elapsed) <= within
        for elapsed, expected in request.expected_late
    )
