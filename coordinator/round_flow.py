"""How a run moves: selecting devices, closing a round, going to the next version, ending. Part of the round machine."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import TYPE_CHECKING

from coordinator import events as e
from coordinator.budget import update_budget
from coordinator.ledger import ledger_row
from coordinator.scheduling import RoundRequest
from coordinator.wording import counted
from edge_runtime.messages import Evaluation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.fleet import FleetView
    from coordinator.run_state import RunState
    from coordinator.scheduling import Choice
    from edge_runtime.messages import EnergyUse


class Work:
    """What one step collects: rows to save, in one transaction, and what is said after that."""

    __slots__ = ("_rows", "fleet", "now", "out")

    def __init__(self, now: float, fleet: FleetView) -> None:
        self.now = now
        self.fleet = fleet
        self.out: list[e.Effect] = []
        self._rows: dict[int, e.Row] = {}

    def save(self, *rows: e.Row) -> None:
        """Rows of the state that changed; their content at the end of the step is saved, each once."""
        for row in rows:
            self._rows[id(row)] = row

    def note_energy(
        self, state: RunState, assignment: e.AssignmentRow, energy: EnergyUse | None, update: e.UpdateRow | None = None
    ) -> None:
        """Saves the ledger's row of a job that ended, with ``update`` or without one."""
        device = self.fleet.get(assignment.device)
        sources = {} if device is None else device.energy_sources
        elapsed_s = max(self.now - assignment.assigned_unix_s, state.plan.participation.deadline_s)
        self.save(ledger_row(assignment, energy, sources, elapsed_s=elapsed_s, update=update))

    def effects(self) -> list[e.Effect]:
        """Save first, with copies: the shell may write them while the state goes on."""
        if not self._rows:
            return self.out
        return [e.Save([copy.copy(row) for row in self._rows.values()]), *self.out]


def progress(state: RunState, work: Work, fleet: FleetView) -> None:
    """Moves the round on as far as it can go now."""
    run = state.run
    if run.phase == "selecting":
        _start(state, work, fleet)
    elif run.phase == "open":
        _watch(state, work, fleet)


def _start(state: RunState, work: Work, fleet: FleetView) -> None:
    run, rules = state.run, state.plan.participation
    if len(fleet.eligible(state.need)) < rules.minimum:
        return  # the usual case before a fleet is there, and a cheap one
    candidates = _candidates(state, fleet)
    there = len(candidates) + len(state.pending)
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
            _repeat_jobs(state, work)
        if there < rules.minimum or work.now < run.short_since_unix_s + state.patience_s:
            return
    asked = _ask(state, work, fleet, candidates, math.ceil(rules.target * rules.over_commit))
    if asked or (not candidates and state.late >= rules.minimum):  # late updates alone make a round, too
        run.phase = "open"
        run.deadline_unix_s = work.now + rules.deadline_s
        work.save(run)


def _watch(state: RunState, work: Work, fleet: FleetView) -> None:
    run, rules = state.run, state.plan.participation
    if state.fresh >= rules.target:
        _close(state, work)
        return
    wanted = math.ceil(rules.target * rules.over_commit) - state.fresh - state.open_attempt
    if wanted > 0:
        _ask(state, work, fleet, _candidates(state, fleet), wanted)
    enough = state.fresh + state.late >= rules.minimum
    if not state.open_round:
        if enough:
            _close(state, work)
            return
        soon = work.now + state.patience_s  # all who were asked have failed: no use in waiting for long
        if soon < run.deadline_unix_s:
            run.deadline_unix_s = soon
            work.save(run)
    if work.now < run.deadline_unix_s:
        return
    if enough:
        _close(state, work)
    elif run.attempt + 1 < rules.attempts:
        _ask_again(state, work, fleet)
    else:
        finish(state, work, "failed", _too_few(state))


def _ask_again(state: RunState, work: Work, fleet: FleetView) -> None:
    run, rules = state.run, state.plan.participation
    run.attempt += 1
    run.deadline_unix_s = work.now + rules.deadline_s
    work.save(run)
    state.recount()
    _repeat_jobs(state, work)
    wanted = math.ceil(rules.target * rules.over_commit) - state.fresh
    _ask(state, work, fleet, _candidates(state, fleet), wanted)


def _repeat_jobs(state: RunState, work: Work) -> None:
    for row in state.assignments.values():
        if row.status == "open":
            work.out.append(e.SendJob(copy.copy(row)))


def _candidates(state: RunState, fleet: FleetView) -> list[str]:
    """Eligible devices with nothing to do in this run that were not asked in this attempt, sorted.

    A device whose update waits for its verdict is left out: it starts no other job of the run before that (what it did
    not send is known only then), and its update counts in this round.
    """
    waiting = {update.device for update in state.pending}
    return sorted(set(fleet.eligible(state.need)).difference(state.busy, state.asked, waiting))


def _ask(state: RunState, work: Work, fleet: FleetView, candidates: list[str], count: int) -> int:
    """Asks up to ``count`` candidates; returns how many."""
    run = state.run
    if not candidates or count <= 0:
        return 0
    request = RoundRequest(
        run=run.run,
        round_=run.round,
        attempt=run.attempt,
        count=min(count, len(candidates)),
        candidates=candidates,
        plan=state.plan,
        random=Random(f"{state.plan.seed}/{run.run}/{run.round}/{run.attempt}/{run.next_assignment}"),
    )
    free = set(candidates)
    asked = 0
    mean = _mean_samples(state, fleet)
    for choice in state.selector.select(work.now, fleet, request)[: request.count]:
        if choice.device not in free:
            continue  # a selector cannot ask a device twice, nor one that is not eligible
        free.discard(choice.device)
        row = e.AssignmentRow(
            run=run.run,
            assignment=f"r{run.round}-{run.next_assignment}",
            device=choice.device,
            round=run.round,
            attempt=run.attempt,
            version=run.version,
            model=run.down or run.model,
            vector_sha256=run.vector_sha256,
            base_version=state.base_for(choice.device),
            epochs=choice.epochs,
            steps=choice.steps,
            variant=choice.variant,
            cut=choice.cut,
            codec=choice.codec,
            byte_budget=_budget(state, fleet, choice, mean),
            assigned_unix_s=work.now,
            deadline_unix_s=work.now + choice.deadline_s,
        )
        run.next_assignment += 1
        state.add_assignment(row)
        work.save(run, row)
        work.out.append(e.SendJob(copy.copy(row)))
        asked += 1
    return asked


def _budget(state: RunState, fleet: FleetView, choice: Choice, mean_samples: float | None) -> int | None:
    """The selector's own budget, else the plan's; none for a codec that the plan knows nothing of."""
    uplink = state.plan.uplink
    if choice.byte_budget is not None or choice.codec != uplink.codec:
        return choice.byte_budget
    elements = state.run.elements * len(state.method.channels)
    samples = _samples(state, fleet, choice.device) if uplink.by_samples else None
    return update_budget(uplink, state.run.round, elements, samples, mean_samples)


def _mean_samples(state: RunState, fleet: FleetView) -> float | None:
    if not state.plan.uplink.by_samples:
        return None
    known = [_samples(state, fleet, device) for device in sorted(fleet.eligible(state.need))]
    counts = [count for count in known if count is not None]
    return sum(counts) / len(counts) if counts else None


def _samples(state: RunState, fleet: FleetView, device: str) -> int | None:
    """What the device announced of the dataset, else what its last update in this run was trained on."""
    found = fleet.get(device)
    dataset = None if found is None else found.dataset(state.plan.dataset)
    if dataset is not None and dataset.samples is not None:
        return dataset.samples
    for assignment in reversed(state.by_device.get(device, ())):
        taken = state.taken(assignment)
        if taken is not None:
            return taken.meta.samples
    return None


def _close(state: RunState, work: Work) -> None:
    state.run.phase = "aggregating"
    work.save(state.run)
    work.out.append(aggregate_effect(state))


def aggregate_effect(state: RunState) -> e.Aggregate:
    """The aggregation of the current round; the same after a restart."""
    run = state.run
    chosen = [row for row in state.pending.values() if row.counted_round == run.round]
    chosen.sort(key=lambda row: row.update)
    assignments = [state.assignments[row.update.assignment] for row in chosen]
    held = {run.version: run.down or run.model, **{row.version: row.model for row in assignments}}
    rows = [copy.copy(row) for row in chosen]
    return e.Aggregate(run.run, run.round, run.version, run.model, rows, held, run.method_state)


def advance(state: RunState, work: Work, event: e.Aggregated) -> None:
    """The new model is there: verdicts, the round's record, and on to the next version."""
    run = state.run
    chosen = [row for row in state.pending.values() if row.counted_round == run.round]
    chosen.sort(key=lambda row: row.update)
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
    run.version += 1
    run.round += 1
    run.attempt = 0
    run.bytes_complete = True
    run.model, run.down, run.method_state = event.model, event.down, event.method_state
    run.vector_sha256 = event.vector_sha256
    if event.change is not None:
        state.changes[run.version] = event.change
    run.opened_unix_s = work.now
    run.phase = "selecting" if run.round < state.plan.rounds else "done"
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


def _drop_stale(state: RunState, work: Work) -> None:
    oldest = state.run.version - state.plan.participation.max_staleness
    for row in state.assignments.values():
        if row.status == "open" and row.version < oldest:
            _cancel(state, work, row, "stale: its update could not count any more")
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
        work.out.append(e.SendVerdict(row.update, counted=False, reason=ending))
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


def _cancel(state: RunState, work: Work, row: e.AssignmentRow, reason: str) -> None:
    state.close_assignment(row, "cancelled", reason)
    work.save(row)
    note_holding(state, work, row, None)  # it may have taken this model, or kept the one before
    work.out.append(e.SendCancel(row.device, row.assignment, reason))


def _too_few(state: RunState) -> str:
    run, rules = state.run, state.plan.participation
    failed = [row for row in state.assignments.values() if row.round == run.round and row.status == "failed"]
    last = f"; last failure, on {failed[-1].device}: {failed[-1].reason}" if failed else ""
    silent = f", {counted(state.open_round, 'device')} never answered" if state.open_round else ""
    return (
        f"round {run.round + 1} had {state.fresh + state.late} of at least {counted(rules.minimum, 'update')} after "
        f"{counted(rules.attempts, 'attempt')} of {rules.deadline_s:g} s{silent}{last}"
    )


def _train_loss(rows: list[e.UpdateRow]) -> float | None:
    known = [(row.meta.samples, row.meta.loss) for row in rows if row.meta.loss is not None]
    samples = sum(count for count, _ in known)
    return math.fsum(count * loss for count, loss in known) / samples if samples else None


def _combine(parts: Iterable[Evaluation | None]) -> Evaluation | None:
    known = [part for part in parts if part is not None and part.samples]
    if not known:
        return None
    counted = all(part.correct is not None for part in known)
    return Evaluation(
        samples=sum(part.samples for part in known),
        loss_sum=math.fsum(part.loss_sum for part in known),
        correct=sum(part.correct or 0 for part in known) if counted else None,
    )
