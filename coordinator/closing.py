"""How a model is made of what came: closing, going to the next version, ending. Part of the round machine."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from coordinator import events as e
from coordinator.asking import blame, outcome
from coordinator.histories import note_cut_off
from edge_runtime.messages import Evaluation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.run_state import RunState
    from coordinator.work import Work


STALE = "stale: its update could not count any more"  # why a job was cut off; more follows once its device answered


def close(state: RunState, work: Work) -> None:
    state.run.phase = "aggregating"
    work.save(state.run)
    work.out.append(aggregate_effect(state))


def aggregate_effect(state: RunState) -> e.Aggregate:
    """The aggregation of the current round; the same after a restart."""
    run = state.run
    chosen = _chosen(state)
    assignments = [state.assignments[row.update.assignment] for row in chosen]
    devices = {row.device for row in assignments}
    return e.Aggregate(
        run=run.run,
        round=run.round,
        version=run.version,
        base=run.model,
        updates=[copy.copy(row) for row in chosen],
        held={run.version: run.down or run.model, **{row.version: row.model for row in assignments}},
        method_state=run.method_state,
        roles={row.assignment: row.role for row in assignments if row.role != "trainer"},
        table={device: state.table[device].blob for device in sorted(devices & state.table.keys())},
        members=len(state.histories),
    )


def _chosen(state: RunState) -> list[e.UpdateRow]:
    """The updates of the current round, in update id order."""
    return sorted(
        (row for row in state.pending.values() if row.counted_round == state.run.round), key=lambda row: row.update
    )


def advance(state: RunState, work: Work, event: e.Aggregated) -> None:
    """The new model is there: verdicts, the round's record, and on to the next version."""
    run = state.run
    chosen = _chosen(state)
    fresh = [row for row in chosen if state.assignments[row.update.assignment].version == run.version]
    for row in chosen:
        row.verdict = "counted"
        del state.pending[row.update]
        work.out.append(e.SendVerdict(row.update, counted=True))
    record = e.RoundRow(
        run=run.run,
        round=run.round,
        version=run.version + 1,
        model=event.model,
        down=event.down,
        change=event.change,
        vector_sha256=event.vector_sha256,
        method_state=event.method_state,
        opened_unix_s=run.opened_unix_s,
        closed_unix_s=work.now,
        updates=len(chosen),
        late_updates=len(chosen) - len(fresh),
        samples=sum(row.meta.samples for row in chosen),
        bytes_up=event.bytes_up,
        bytes_down=event.bytes_down,
        bytes_bundle=event.bytes_bundle,
        bytes_complete=run.bytes_complete,
        encode_cpu_ms=sum(row.meta.encode_cpu_ms for row in chosen),
        written_bytes=sum(row.meta.written_bytes for row in chosen),
        train_loss=_train_loss(chosen),
        devices=_combine(row.meta.evaluation for row in fresh),
    )
    _tell_selector(state, work, chosen)
    for device, blob in event.table.items():
        state.table[device] = e.TableRow(run=run.run, device=device, blob=blob, round=run.round)
        work.save(state.table[device])
    run.version += 1
    run.round += 1
    run.attempt = run.places = run.wanted = 0
    run.select_after_unix_s = 0.0
    run.hyper = event.hyper
    run.bytes_complete = True
    run.model, run.down, run.method_state = event.model, event.down, event.method_state
    run.vector_sha256 = event.vector_sha256
    if event.change is not None:
        state.changes[run.version] = event.change
    run.opened_unix_s = work.now
    run.phase = "done" if run.round == state.plan.rounds else "selecting" if state.mode == "synchronous" else "open"
    if run.phase == "open":
        run.deadline_unix_s = work.now + state.plan.participation.deadline_s
    work.save(*chosen, record, run)
    if state.is_evaluated(run.version):
        state.unevaluated[run.version] = record
        work.out.append(e.Evaluate(run.version, run.model))
    _drop_stale(state, work)
    state.recount()
    if run.phase == "done":
        _cancel_open(state, work, "the run's last round is closed")
        if not state.evaluations_due():
            finish(state, work, "finished", "")


def _tell_selector(state: RunState, work: Work, chosen: list[e.UpdateRow]) -> None:
    """The selector learns which updates the round took; it may change energy queues of devices."""
    run = state.run
    outcomes = [
        outcome(
            state.assignments[row.update.assignment],
            row.meta,
            received_unix_s=row.received_unix_s,
            counted_round=run.round,
        )
        for row in chosen
    ]
    memory = dict(run.selector_memory)
    changed = state.selector.round_closed(run.round, outcomes, state.histories, memory)
    run.selector_memory = memory
    work.save(*(state.histories[device] for device in changed if device in state.histories))


def _drop_stale(state: RunState, work: Work) -> None:
    """Ends what cannot count any more: whoever let its deadline pass, or never says a word, has failed."""
    oldest = state.run.version - state.plan.participation.max_staleness
    for row in state.assignments.values():
        if row.status == "open" and row.version < oldest and (row.pulled or not row.standing):
            if row.standing:  # its device asked for it
                state.end_pull(row, STALE)
                work.save(row)
                blame(state, work, row, STALE)
                continue
            _cancel(state, work, row, STALE)
            history = state.history(row.device)
            if note_cut_off(history) or work.now >= row.deadline_unix_s:
                blame(state, work, row, STALE)
            work.save(history)
    state.prune()


def finish(state: RunState, work: Work, status: e.RunStatus, reason: str) -> None:
    """Ends the run: no update stays without a verdict, no device keeps a job."""
    run = state.run
    run.status, run.reason, run.phase, run.ended_unix_s = status, reason, "done", work.now
    work.save(run)
    ending = f"run has ended: {reason or status}"
    for row in sorted(state.pending.values(), key=lambda row: row.update):
        row.verdict, row.reason, row.counted_round, row.weight = "refused", ending, None, None
        work.save(row)
        work.out.append(e.SendVerdict(row.update, counted=False, reason=ending, ends=True))
    state.pending.clear()
    _cancel_open(state, work, ending)
    work.out.append(e.Finished(status, reason))
    state.recount()


def note_holding(state: RunState, work: Work, row: e.AssignmentRow, version: int | None) -> None:
    """What the device of an assignment holds after it, where it matters."""
    holding = None if state.ended else state.hold(row, version)
    if holding is not None:
        work.save(holding)


def start_evaluations(state: RunState, out: list[e.Effect]) -> None:
    """Asks for all evaluations that are due."""
    out.extend(e.Evaluate(version, model) for version, model in state.evaluations_due().items())


def _cancel_open(state: RunState, work: Work, reason: str) -> None:
    for row in state.assignments.values():
        if row.status == "open":
            _cancel(state, work, row, reason)
    state.prune()


def _cancel(state: RunState, work: Work, row: e.AssignmentRow, reason: str) -> None:
    state.close_assignment(row, "cancelled", reason)
    work.save(row)
    note_holding(state, work, row, None)  # it may have taken this model, or kept the one before
    work.out.append(e.SendCancel(row.device, row.assignment, reason))


def _train_loss(rows: list[e.UpdateRow]) -> float | None:
    known = [(row.meta.samples, row.meta.loss) for row in rows if row.meta.loss is not None]
    samples = sum(count for count, _ in known)
    return math.fsum(count * loss for count, loss in known) / samples if samples else None


def _combine(parts: Iterable[Evaluation | None]) -> Evaluation | None:
    known = [part for part in parts if part is not None and part.samples]
    if not known:
        return None
    counted = [part for part in known if part.correct is not None]  # who counts none takes them from nobody
    known = counted or known
    return Evaluation(
        samples=sum(part.samples for part in known),
        loss_sum=math.fsum(part.loss_sum for part in known),
        correct=sum(part.correct or 0 for part in known) if counted else None,
    )
