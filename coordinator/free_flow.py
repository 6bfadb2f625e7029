"""How a run without rounds moves: "buffered" and "anarchic". Part of the round machine.

*Buffered* (FedBuff; Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022): so many
devices are at work at any time, each from the model that was newest when it was asked; whoever delivers, fails or
takes longer than its deadline makes place for another one, and what it sends later still counts. *Anarchic* (Yang et
al., "Anarchic Federated Learning", ICML 2022): devices hold standing assignments, and each decides itself when it pulls
the newest model and how many steps it takes. In both every ``target`` updates make the next model.

A device waits for the verdict on its update before it starts anew, so a fleet that is smaller than the target cannot
fill it: where nobody is at work any more, or nothing came for as long as a deadline (and ``interval_s``, in an anarchic
run), ``minimum`` updates make a model. The run fails when jobs are out, or failed, and nothing came for ``attempts``
times as long.
"""

from __future__ import annotations

import copy
import heapq
from typing import TYPE_CHECKING

from coordinator import events as e
from coordinator.asking import ask, blame, candidates, due, may_select, renewed_budget, repeat_jobs
from coordinator.closing import close, finish
from coordinator.histories import note_asked
from coordinator.plan import step_bounds
from coordinator.wording import counted

if TYPE_CHECKING:
    from coordinator.fleet import FleetView
    from coordinator.run_state import RunState
    from coordinator.work import Work


def flow(state: RunState, work: Work, fleet: FleetView) -> None:
    """Moves a run without rounds on as far as it can go now."""
    run, rules = state.run, state.plan.participation
    _answer_early(state, work)
    if run.phase == "selecting":
        if len(fleet.eligible(state.need)) < rules.minimum:
            return
        run.phase = "open"
        _start_waiting(state, work)
    if run.phase != "open":
        return
    _expire(state, work)
    there = state.fresh + state.late
    if there >= rules.target:
        close(state, work)
        return
    wanted = state.places - state.at_work
    if wanted > 0 and may_select(state, work, fleet):
        idle = not state.at_work
        asked = ask(state, work, fleet, candidates(state, work, fleet), wanted)
        if asked.chosen and idle:
            _start_waiting(state, work)
    if there >= rules.minimum and not _at_work(state):
        soon = work.now + state.patience_s
        if soon < run.deadline_unix_s:
            run.deadline_unix_s = soon
            work.save(run)
    if work.now >= run.deadline_unix_s:
        _silence(state, work, fleet, there)


def note_arrival(state: RunState, work: Work) -> None:
    """An update was taken in: the run lives."""
    run = state.run
    if state.mode != "synchronous" and run.phase == "open":
        run.attempt = 0
        _start_waiting(state, work)


def _start_waiting(state: RunState, work: Work) -> None:
    state.run.deadline_unix_s = work.now + state.silence_s
    work.save(state.run)


def pulled(state: RunState, work: Work, event: e.Pulled) -> None:
    """A device wants the newest model, to train its standing assignment now."""
    row = state.assignments.get(event.assignment)
    if row is not None and (row.device != event.device or not row.standing):
        return  # it cannot be meant
    if row is None or row.status != "open":
        reason = "there is no such assignment any more" if row is None else row.reason
        work.out.append(e.SendCancel(event.device, event.assignment, reason))
        return
    waits = [name for name in state.by_assignment.get(row.assignment, ()) if name in state.pending]
    if waits:
        work.out += [e.SendDone(name) for name in waits]  # first comes its verdict
    elif row.pulled and (event.sequence <= row.sequence or work.now < row.deadline_unix_s):
        work.out.append(e.SendJob(copy.copy(row)))
    elif event.sequence <= row.sequence:
        work.out += due(row)  # tells the number that comes next
    elif state.run.phase != "done":
        interval_s = state.plan.participation.interval_s
        if row.sequence >= 0 and work.now < row.assigned_unix_s + interval_s:
            _answer_later(state, event, row.assigned_unix_s + interval_s)
        else:
            _begin(state, work, row, event)


def _answer_later(state: RunState, event: e.Pulled, due_s: float) -> None:
    """The interval since the pull before is not over: the job comes when it is."""
    clock = state.clock
    if event.assignment not in clock.early:
        heapq.heappush(clock.early_due, (due_s, event.assignment))
    clock.early[event.assignment] = event


def _answer_early(state: RunState, work: Work) -> None:
    """Answers the pulls that came too early and are due now; a device that left meanwhile says its own again."""
    clock = state.clock
    while clock.early_due and clock.early_due[0][0] <= work.now:
        event = clock.early.pop(heapq.heappop(clock.early_due)[1])
        device = work.fleet.get(event.device)
        if device is not None and device.online:
            pulled(state, work, event)


def _begin(state: RunState, work: Work, row: e.AssignmentRow, event: e.Pulled) -> None:
    run = state.run
    if row.pulled:  # its deadline passed, and the device goes on without it
        blame(state, work, row, "its update never came")
    least, most = step_bounds(state.plan)
    if not state.pulls:
        _start_waiting(state, work)
    state.forget_updates(row.assignment)
    state.pull(
        row,
        sequence=event.sequence,
        steps=min(max(event.steps, least), most),
        assigned_unix_s=work.now,
        deadline_unix_s=work.now + state.plan.participation.deadline_s,
    )
    row.byte_budget = renewed_budget(state, work.fleet, row)
    history = state.history(row.device)
    note_asked(history, run.round)
    work.save(row, history)
    work.out.append(e.SendJob(copy.copy(row)))


def _expire(state: RunState, work: Work) -> None:
    """Assignments whose deadline passed make place for others; their updates still count."""
    clock = state.clock
    if state.mode != "buffered" or work.now < clock.next_expiry_s:
        return
    open_rows = [row for row in state.assignments.values() if row.status == "open" and not row.away]
    clock.next_expiry_s = min((row.deadline_unix_s for row in open_rows), default=float("inf"))
    if work.now < clock.next_expiry_s:
        return
    for row in open_rows:
        if row.deadline_unix_s <= work.now:
            state.set_away(row, away=True)
            work.save(row)
    clock.next_expiry_s = min((row.deadline_unix_s for row in open_rows if not row.away), default=float("inf"))


def _at_work(state: RunState) -> int:
    """Devices from which an update may come soon."""
    if state.mode == "buffered":
        return state.at_work
    delivered = sum(not state.assignments[update.assignment].away for update in state.pending)
    return state.at_work - delivered


def _silence(state: RunState, work: Work, fleet: FleetView, there: int) -> None:
    """Nothing came for as long as it may take: jobs are repeated; where there are none, those that failed are asked."""
    run, rules = state.run, state.plan.participation
    if there >= rules.minimum:
        close(state, work)
        return
    _start_waiting(state, work)
    if _was_tried(state):
        if run.attempt + 1 >= rules.attempts:
            finish(state, work, "failed", _nothing_came(state))
            return
        run.attempt += 1
        repeat_jobs(state, work)
    if not state.at_work:
        ask(state, work, fleet, candidates(state, work, fleet, rules.minimum), state.places)


def _was_tried(state: RunState) -> bool:
    """Whether an update is owed, or failed to come since the last silence."""
    run = state.run
    return any(
        row.pulled
        or (row.status == "open" and not row.standing)
        or (row.reason and row.status in ("open", "failed") and (row.round, row.attempt) == (run.round, run.attempt))
        for row in state.assignments.values()
    )


def _nothing_came(state: RunState) -> str:
    rules = state.plan.participation
    failed = [row for row in state.assignments.values() if row.reason and row.status in ("open", "failed")]
    last = f"; last failure, on {failed[-1].device}: {failed[-1].reason}" if failed else ""
    owed = sum(row.pulled or (row.status == "open" and not row.standing) for row in state.assignments.values())
    silent = f", {counted(owed, 'device')} never answered" if owed else ""
    span = f"the deadline of {rules.deadline_s:g} s"
    if state.silence_s > rules.deadline_s:
        span += f" and the interval of {rules.interval_s:g} s"
    return f"no update came for {counted(rules.attempts, 'time')} {span}{silent}{last}"
