"""The round machine: pure decisions of one run. ``effects = step(state, event, fleet)``.

Runs without rounds ("buffered", "anarchic") are in :mod:`coordinator.free_flow`; all else is the same for them. A round
goes through three phases. *Selecting*: as soon as ``target`` devices are eligible and idle, the selector picks
``ceil(target * over_commit)`` of them; with fewer, but at least ``minimum``, the round waits a tenth of the deadline
once per shortage, then starts with those that are there and asks others as they appear. *Open*: closes when ``target``
updates of the current version arrived, when all who were asked have answered and nobody else can be asked, or at the
deadline, the latter two with at least ``minimum`` updates (late ones included). A deadline with fewer repeats the jobs
still open and asks further devices, ``attempts`` times in all; then the run fails. A device that goes offline keeps
its assignment, but another one is asked in its place. *Aggregating*: the shell makes the
next model. Updates that arrive meanwhile belong to the next round.

An update gets its round, staleness and weight when it is taken in, so nothing that was acknowledged is refused later,
unless the run ends. ``step`` is O(1) apart from selecting and closing; it uses no clock, no I/O and no randomness but
``Random`` seeded from plan seed, run, round and attempt.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from coordinator import events as e
from coordinator import free_flow, round_flow
from coordinator.asking import blame, due, observe, outcome
from coordinator.closing import STALE, advance, aggregate_effect, finish, note_holding, start_evaluations
from coordinator.free_flow import note_arrival, pulled
from coordinator.histories import note_answered, note_declined, note_taken
from coordinator.plausibility import implausible, trusted
from coordinator.scheduling import Outcome
from coordinator.wording import counted
from coordinator.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.fleet import FleetView
    from coordinator.run_state import RunState
    from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta

__all__ = ["resume", "step"]

REFUSALS_STORED = 4  # per assignment


def step(state: RunState, event: e.Event, fleet: FleetView) -> list[e.Effect]:
    """What has to be done about one event. Changes ``state``; carry the effects out in order.

    Events of any order, repeated, or about things unknown are fine; none raises.
    """
    work = Work(event.now, fleet)
    back_s = state.clock.now - event.now
    if back_s > state.plan.participation.deadline_s:  # the clock was set back
        work.save(*state.bound_times(event.now, back_s))
    state.clock.now = event.now
    _HANDLERS[type(event)](state, work, event)
    (round_flow if state.mode == "synchronous" else free_flow).flow(state, work, fleet)
    return work.effects()


def resume(state: RunState) -> list[e.Effect]:
    """All outward effects that are still due, for a state just built. Those already carried out do no harm.

    Jobs go to all devices with open assignments; the shell may drop those for devices that are not connected, since
    DeviceJoined repeats them.
    """
    out: list[e.Effect] = []
    for row in state.updates.values():
        if row.verdict == "pending":
            out.append(e.SendDone(row.update))
        else:
            out.append(_verdict(state, row))
    for assignment in state.assignments.values():
        if assignment.status == "open":
            out += due(assignment)
        elif assignment.status == "cancelled":
            out.append(e.SendCancel(assignment.device, assignment.assignment, assignment.reason))
    if state.ended:
        out.append(e.Finished(state.run.status, state.run.reason))
        return out
    if state.run.phase == "aggregating":
        out.append(aggregate_effect(state))
    start_evaluations(state, out)
    return out


def _time_passed(_state: RunState, _work: Work, _event: e.Tick) -> None:
    """All that time does is done by ``progress``."""


def _offered(state: RunState, work: Work, event: e.UpdateOffered) -> None:
    if not _answered(state, work, event.update, event.blob, event.meta):
        work.out.append(e.Fetch(event.update, event.blob, event.meta))


def _arrived(state: RunState, work: Work, event: e.UpdateArrived) -> None:
    if not _answered(state, work, event.update, event.blob, event.meta):
        _take(state, work, event)


def _damaged(state: RunState, work: Work, event: e.UpdateDamaged) -> None:
    if not _answered(state, work, event.update, event.blob, event.meta):
        _refuse(state, work, event, event.reason)


def _aggregated(state: RunState, work: Work, event: e.Aggregated) -> None:
    if state.run.phase == "aggregating" and event.round == state.run.round:
        advance(state, work, event)


def _stop(state: RunState, work: Work, event: e.StopRequested) -> None:
    if not state.ended:
        finish(state, work, "stopped", event.reason)


def _work_failed(state: RunState, work: Work, event: e.WorkFailed) -> None:
    if not state.ended:
        finish(state, work, "failed", event.reason)


def _answered(state: RunState, work: Work, name: UpdateId, blob: BlobRef, meta: UpdateMeta) -> bool:
    """Answers an update that is known or cannot count; False if its bytes are wanted."""
    known = state.updates.get(name)
    if known is not None:
        work.out.append(e.SendDone(name) if known.verdict == "pending" else _verdict(state, known))
        return True
    assignment = state.assignments.get(name.assignment)
    if assignment is None or name.run != state.run.run:
        work.out.append(e.AnswerFromStore(name, ends=True))
        return True
    if assignment.device != name.device:  # not stored: the reason never changes, and strangers fill no table
        reason = "this assignment belongs to another device"
        work.out.append(e.SendVerdict(name, counted=False, reason=reason, ends=True))
        return True
    if assignment.standing and name.sequence != assignment.sequence:
        if name.sequence < assignment.sequence:
            work.out.append(e.AnswerFromStore(name, ends=_is_over(state, assignment)))
        else:  # not stored, for the same reason
            work.out.append(e.SendVerdict(name, counted=False, reason=f"update {name.sequence} was never pulled"))
        return True
    reason = _unwanted(state, assignment, name, meta)
    if reason:
        row = e.UpdateRow(update=name, blob=blob, meta=meta, received_unix_s=work.now)
        _refuse(state, work, row, reason)
        _note_answer(state, work, assignment, "its update came", elapsed_s=work.now - assignment.assigned_unix_s)
        if assignment.status == "cancelled" and meta.model_version == assignment.version and not state.ended:
            note_holding(state, work, assignment, assignment.version)  # too late to count, but this it trained on
        return True
    return False


def _unwanted(state: RunState, assignment: e.AssignmentRow, name: UpdateId, meta: UpdateMeta) -> str:  # noqa: PLR0911
    """Why an update of a known assignment cannot count; empty if it can."""
    run = state.run
    closing = run.phase == "aggregating"
    staleness = run.round + closing - assignment.version
    if state.ended:
        return f"run has ended: {run.reason or run.status}"
    if run.phase == "done" or run.round + closing >= state.plan.rounds:
        return "run has ended: its last round is closed"
    if assignment.status == "received":
        taken = state.taken(name.assignment)
        return f"this assignment already delivered update {taken.update.sequence if taken else ''}"
    if meta.samples <= 0:
        return f"trained on {counted(meta.samples, 'sample')}"
    if meta.model_version != assignment.version:
        return f"trained from model version {meta.model_version}, the assignment is of version {assignment.version}"
    limit = state.plan.participation.max_staleness
    if staleness > limit:
        return f"stale: {counted(staleness, 'version')} late, at most {limit} may be"
    return implausible(meta, assignment.steps) or state.method.accept(meta, staleness)


def _take(state: RunState, work: Work, event: e.UpdateArrived) -> None:
    assignment = state.assignments[event.update.assignment]
    round_ = state.run.round + (state.run.phase == "aggregating")
    row = e.UpdateRow(
        update=event.update,
        blob=event.blob,
        meta=trusted(event.meta),
        received_unix_s=work.now,
        counted_round=round_,
        weight=state.method.weight(event.meta, round_ - assignment.version),
    )
    if assignment.standing:
        state.end_pull(assignment)
    else:
        state.close_assignment(assignment, "received")
    state.add_update(row)
    note_arrival(state, work)
    ended = outcome(assignment, row.meta, received_unix_s=work.now, counted_round=round_)
    history = state.history(assignment.device)
    deadline_s = state.plan.participation.deadline_s
    note_taken(history, assignment, row.meta, elapsed_s=ended.elapsed_s, deadline_s=deadline_s)
    work.save(row, assignment, history)
    work.note_energy(state, assignment, row.meta.energy, row)
    note_holding(state, work, assignment, assignment.version)
    work.out.append(e.SendDone(event.update))
    observe(state, work, assignment.device, ended)


def _refuse(state: RunState, work: Work, event: e.UpdateDamaged | e.UpdateRow, reason: str) -> None:
    if len(state.by_assignment.get(event.update.assignment, ())) >= REFUSALS_STORED:
        ends = _is_over(state, state.assignments.get(event.update.assignment))
        work.out.append(e.SendVerdict(event.update, counted=False, reason=reason, ends=ends))
        return  # one device cannot fill memory and tables with ever new sequence numbers
    row = e.UpdateRow(
        update=event.update,
        blob=event.blob,
        meta=trusted(event.meta),
        received_unix_s=work.now,
        verdict="refused",
        reason=reason,
    )
    assignment = state.assignments[event.update.assignment]
    state.add_update(row)
    work.save(row)
    work.note_energy(state, assignment, row.meta.energy, row)
    work.out.append(_verdict(state, row))
    _failed(state, work, assignment, reason)


def _job_failed(state: RunState, work: Work, event: e.JobReported) -> None:
    assignment = state.assignments.get(event.assignment)
    if assignment is None or assignment.device != event.device:
        return
    if event.energy is not None or (assignment.status == "open" and not event.rejected):  # rejected: never begun
        work.note_energy(state, assignment, event.energy)
    _note_answer(state, work, assignment, event.reason)
    if event.rejected and event.declined_s is not None:
        _declined(state, work, assignment, event)
        return
    if event.rejected and assignment.status == "open" and assignment.base_version and _owes(assignment):
        # Most likely it no longer holds what the coordinator thought: it gets the same job without that, once.
        note_holding(state, work, assignment, None)
        assignment.base_version = state.base_without_held(assignment)
        work.save(assignment)
        work.out.append(e.SendJob(copy.copy(assignment)))
        return
    _failed(state, work, assignment, event.reason)


def _note_answer(
    state: RunState, work: Work, assignment: e.AssignmentRow, answer: str, *, elapsed_s: float | None = None
) -> None:
    """The device is heard of about a job that was cut off, for the first time: it is slow, not silent."""
    if assignment.status == "cancelled" and assignment.reason == STALE:
        assignment.reason = f"{STALE}; {answer}"
        history = state.history(assignment.device)
        note_answered(history, elapsed_s)
        work.save(assignment, history)


def _declined(state: RunState, work: Work, assignment: e.AssignmentRow, event: e.JobReported) -> None:
    """The device may not, or cannot afford it: its place is free, and it is left alone for a while."""
    if assignment.status != "open":
        return
    _end(state, work, assignment, "declined", event.reason)
    history = state.history(assignment.device)
    note_declined(history, work.now, event.declined_s or 0.0)
    work.save(history)
    observe(state, work, assignment.device, Outcome(assignment=assignment, reason=event.reason, declined=True))


def _failed(state: RunState, work: Work, assignment: e.AssignmentRow, reason: str) -> None:
    """Frees the place of an assignment that will not bring an update."""
    if assignment.status != "open" or not (_owes(assignment) or assignment.sequence < 0):
        return
    _end(state, work, assignment, "failed", reason)
    note_holding(state, work, assignment, None)
    blame(state, work, assignment, reason)


def _owes(assignment: e.AssignmentRow) -> bool:
    """Whether an update is still to come of an open assignment: of a standing one, once it was pulled."""
    return assignment.pulled or not assignment.standing


def _end(state: RunState, work: Work, assignment: e.AssignmentRow, status: e.AssignmentStatus, reason: str) -> None:
    """Ends an open assignment; of a standing one that was ever pulled only that pull."""
    if assignment.standing and assignment.sequence >= 0:
        state.end_pull(assignment, reason)
    else:
        state.close_assignment(assignment, status, reason)
        if assignment.standing:  # nothing was ever trained for it
            work.out.append(e.SendCancel(assignment.device, assignment.assignment, reason))
            state.prune()
    work.save(assignment)


def _tell_again(state: RunState, work: Work, event: e.DeviceJoined) -> None:
    device = event.device
    for name in state.by_device.get(device, ()):
        assignment = state.assignments[name]
        for update in state.by_assignment.get(name, ()):
            row = state.updates[update]
            work.out.append(e.SendDone(update) if row.verdict == "pending" else _verdict(state, row))
        if assignment.status == "open":
            _set_away(state, work, assignment, away=False)
            work.out += due(assignment)
        elif assignment.status == "cancelled":
            work.out.append(e.SendCancel(device, name, assignment.reason))


def _left(state: RunState, work: Work, event: e.DeviceLeft) -> None:
    for name in state.by_device.get(event.device, ()):
        if state.assignments[name].status == "open":
            _set_away(state, work, state.assignments[name], away=True)


def _set_away(state: RunState, work: Work, assignment: e.AssignmentRow, *, away: bool) -> None:
    if assignment.away != away:
        state.set_away(assignment, away)
        work.save(assignment)


def _evaluated(state: RunState, work: Work, event: e.Evaluated) -> None:
    row = state.unevaluated.pop(event.version, None)
    if row is not None:
        row.test = event.evaluation
        work.save(row)
    elif event.version == 0 and state.run.initial_test is None:
        state.run.initial_test = event.evaluation
        work.save(state.run)
    if state.run.phase == "done" and not state.ended and not state.evaluations_due():
        finish(state, work, "finished", "")


def _verdict(state: RunState, row: e.UpdateRow) -> e.SendVerdict:
    ends = _is_over(state, state.assignments.get(row.update.assignment))
    return e.SendVerdict(row.update, counted=row.verdict == "counted", reason=row.reason, ends=ends)


def _is_over(state: RunState, assignment: e.AssignmentRow | None) -> bool:
    """Whether nothing more can come of an assignment; one that is not standing is over with its update anyway."""
    if assignment is None or state.run.phase == "done":
        return True
    return assignment.standing and assignment.status != "open"


_HANDLERS: dict[type, Callable[[RunState, Work, Any], None]] = {
    e.Tick: _time_passed,
    e.DeviceJoined: _tell_again,
    e.DeviceLeft: _left,
    e.UpdateOffered: _offered,
    e.UpdateArrived: _arrived,
    e.UpdateDamaged: _damaged,
    e.JobReported: _job_failed,
    e.Pulled: pulled,
    e.Aggregated: _aggregated,
    e.Evaluated: _evaluated,
    e.StopRequested: _stop,
    e.WorkFailed: _work_failed,
}
