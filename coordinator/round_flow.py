"""How a run with rounds moves: selecting devices, and when a round closes. Part of the round machine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coordinator.asking import ask, candidates, may_select, repeat_jobs
from coordinator.closing import close, finish
from coordinator.wording import counted

if TYPE_CHECKING:
    from coordinator.asking import Asked
    from coordinator.fleet import FleetView
    from coordinator.run_state import RunState
    from coordinator.work import Work


def flow(state: RunState, work: Work, fleet: FleetView) -> None:
    """Moves the round on as far as it can go now."""
    run = state.run
    if run.phase == "selecting":
        _start(state, work, fleet)
    elif run.phase == "open":
        _watch(state, work, fleet)


def _start(state: RunState, work: Work, fleet: FleetView) -> None:
    run, rules = state.run, state.plan.participation
    most = len(fleet.eligible(state.need)) + len(state.pending)  # cheap, and mostly enough
    if most < rules.minimum:
        return  # the usual case before a fleet is there
    patient = run.short_since_unix_s is not None and work.now < run.short_since_unix_s + state.patience_s
    if (most < rules.target and patient and not state.busy) or not may_select(state, work, fleet):
        return
    waited = run.short_since_unix_s is not None and not patient
    free = candidates(state, work, fleet, rules.minimum - len(state.pending) if waited else 0)
    there = len(free) + len(state.pending)
    if there >= rules.target:
        if run.short_since_unix_s is not None:
            run.short_since_unix_s = None
            work.save(run)
    else:
        if run.short_since_unix_s is None:
            run.short_since_unix_s = work.now
            work.save(run)
        if state.busy and work.now >= run.deadline_unix_s:  # the jobs of those who are missing may have been lost
            run.deadline_unix_s = work.now + rules.deadline_s
            work.save(run)
            repeat_jobs(state, work)
        if there < rules.minimum or work.now < run.short_since_unix_s + state.patience_s:
            return
    asked = ask(state, work, fleet, free, state.places)
    if asked.chosen or (not free and state.late >= rules.minimum):  # late updates alone make a round, too
        run.phase = "open"
        run.deadline_unix_s = work.now + rules.deadline_s
        run.places, run.wanted = _places(state, asked), max(0, asked.wanted or 0)
        work.save(run)


def _places(state: RunState, asked: Asked) -> int:
    """Devices that the round wants at work: as many as the selector chose, and more where only few could be chosen."""
    rules = state.plan.participation
    if asked.chosen < asked.sought:
        return max(asked.chosen, rules.minimum)
    if asked.wanted is None:
        return state.places
    return min(state.places, max(asked.chosen, rules.minimum, math.ceil(asked.wanted * rules.over_commit - 1e-9)))


def _watch(state: RunState, work: Work, fleet: FleetView) -> None:
    run, rules = state.run, state.plan.participation
    if state.fresh >= state.goal:
        close(state, work)
        return
    wanted = state.places - state.fresh - state.open_attempt
    if wanted > 0 and may_select(state, work, fleet):
        ask(state, work, fleet, candidates(state, work, fleet), wanted)
    enough = state.fresh + state.late >= rules.minimum
    if not state.open_round:
        if enough:
            close(state, work)
            return
        soon = work.now + state.patience_s  # all who were asked have failed: no use in waiting for long
        if soon < run.deadline_unix_s:
            run.deadline_unix_s = soon
            work.save(run)
    if work.now < run.deadline_unix_s:
        return
    if enough:
        close(state, work)
    elif not state.open_round and not _was_tried(state):
        asked = _ask_those_left(state, work, fleet)
        run.deadline_unix_s = work.now + (rules.deadline_s if asked.chosen else state.patience_s)
        work.save(run)  # all declined or are kept waiting: that is no failure
    elif run.attempt + 1 < rules.attempts:
        _ask_again(state, work, fleet)
    else:
        finish(state, work, "failed", _too_few(state))


def _was_tried(state: RunState) -> bool:
    """Whether a device was asked in this attempt that did not decline."""
    run = state.run
    return any(
        row.round == run.round and row.attempt == run.attempt and row.status != "declined"
        for row in state.assignments.values()
    )


def _ask_again(state: RunState, work: Work, fleet: FleetView) -> None:
    run, rules = state.run, state.plan.participation
    run.attempt += 1
    run.deadline_unix_s = work.now + rules.deadline_s
    run.select_after_unix_s = 0.0
    work.save(run)
    state.recount()
    repeat_jobs(state, work)
    _ask_those_left(state, work, fleet)


def _ask_those_left(state: RunState, work: Work, fleet: FleetView) -> Asked:
    """Where the others are too few, also those that are left alone since they failed: else the round stands still."""
    least = state.plan.participation.minimum - state.fresh - state.late
    return ask(state, work, fleet, candidates(state, work, fleet, least), state.places - state.fresh)


def _too_few(state: RunState) -> str:
    run, rules = state.run, state.plan.participation
    failed = [row for row in state.assignments.values() if row.round == run.round and row.status == "failed"]
    last = f"; last failure, on {failed[-1].device}: {failed[-1].reason}" if failed else ""
    silent = f", {counted(state.open_round, 'device')} never answered" if state.open_round else ""
    return (
        f"round {run.round + 1} had {state.fresh + state.late} of at least {counted(rules.minimum, 'update')} after "
        f"{counted(rules.attempts, 'attempt')} of {rules.deadline_s:g} s{silent}{last}"
    )
