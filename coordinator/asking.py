"""Who is asked next, and for what: candidates, the selector's choices, assignments. Part of the round machine."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from coordinator import events as e
from coordinator.budget import FLOAT_BYTES, update_budget
from coordinator.histories import note_asked, note_failed
from coordinator.scheduling import Outcome, RoundRequest
from coordinator.wording import counted, duration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.fleet import FleetView
    from coordinator.run_state import RunState
    from coordinator.scheduling import Choice
    from coordinator.scheduling.explaining import Report
    from coordinator.work import Work
    from edge_runtime.messages import Role, UpdateMeta

PAUSES = 10  # in the patience of a round: how often a selector is asked again that chose fewer than wanted
CROWD = 1000  # candidates; to select among so many takes some ms, and a whole site may leave at once:
CROWD_PAUSE_S = 0.5  # then the places that become free meanwhile are given on together
NOBODY_PAUSE_S = 10.0  # before a selector that chose nobody is asked again, where nothing changed
NOBODY_KEPT = 50  # reports that are kept of selections of one round that chose nobody


def candidates(state: RunState, work: Work, fleet: FleetView, least: int = 0) -> list[str]:
    """Eligible devices with nothing to do in this run that may be asked now, sorted.

    In a run with rounds each is asked once per attempt. A device whose update waits for its verdict is left out: it
    starts no other job of the run before that (what it did not send is known only then), and its update counts in this
    round. Devices that declined or failed are left out until they are to be asked again; where that leaves fewer than
    ``least``, those that failed come in before that. O(1) where nothing changed since nobody was there.
    """
    clock = state.clock
    there = _there(state, fleet)
    if clock.nobody is not None and clock.nobody[:2] == there and work.now < clock.nobody[2]:
        found: list[str] = []
    else:
        clock.nobody = None
        found = _without(_taken(state, work.now), state, fleet)
        if not found:
            paused = [row for row in state.histories.values() if row.not_before_unix_s > work.now]
            ends = min((row.not_before_unix_s for row in paused), default=math.inf)
            clock.nobody = (*there, ends, not all(row.declined for row in paused))
    if len(found) < least and (clock.nobody is None or clock.nobody[3]):
        return _without(_taken(state, work.now, failed=False), state, fleet)
    return found


def _without(taken: set[str], state: RunState, fleet: FleetView) -> list[str]:
    return [name for name in fleet.names(state.need) if name not in taken]


def _taken(state: RunState, now: float, *, failed: bool = True) -> set[str]:
    """Devices that may not be asked now, with or without those that are left alone since they failed."""
    asked = state.asked if state.mode == "synchronous" else ()
    waiting = (update.device for update in state.pending)
    left_alone = (
        name for name, row in state.histories.items() if row.not_before_unix_s > now and (failed or row.declined)
    )
    return {*state.busy, *asked, *waiting, *left_alone}


class Asked(NamedTuple):
    """Devices that were asked, how many were sought, and the updates that the selector wants (None: the plan's)."""

    chosen: int
    sought: int
    wanted: int | None = None


def ask(state: RunState, work: Work, fleet: FleetView, free: list[str], count: int) -> Asked:
    """Asks up to ``count`` of the devices that are free."""
    from coordinator.scheduling.explaining import Report, pack  # numpy: only where runs are run

    run = state.run
    if not free or count <= 0:
        return Asked(0, 0)
    memory = dict(run.selector_memory)
    request = _request(state, work.now, free, min(count, len(free)), memory)
    selection = state.selector.select(work.now, fleet, request)
    run.selector_memory = memory
    left = set(free)
    busy = why_busy(state, work.now, set(fleet.eligible(state.need)) - left)
    chosen: dict[str, Choice] = {}
    for choice in selection.choices[: request.count]:
        if choice.device in left:  # nobody twice, and nobody who is not free
            left.discard(choice.device)
            chosen[choice.device] = choice
    mean = _mean_samples(state, fleet)
    for choice in chosen.values():
        _assign(state, work, fleet, choice, mean)
    if len(chosen) < request.count:
        soon = work.now + state.patience_s / PAUSES
        run.select_after_unix_s = soon if chosen else max(soon, work.now + min(NOBODY_PAUSE_S, state.patience_s))
        state.clock.unwilling = None if chosen else (_there(state, fleet), soon)
    elif len(free) >= CROWD:
        run.select_after_unix_s = work.now + CROWD_PAUSE_S
    report = Report(chosen=chosen, notes=selection.notes, unfit=dict(fleet.unfit_reasons(state.need)), busy=busy)
    if _is_news(state, report):
        row = e.SelectionRow(
            run=run.run,
            number=run.next_selection,
            round=run.round,
            attempt=run.attempt,
            at_unix_s=work.now,
            report=pack(report),
        )
        work.save(row)
    run.next_selection += 1
    work.save(run)
    return Asked(len(chosen), request.count, selection.wanted)


def may_select(state: RunState, work: Work, fleet: FleetView) -> bool:
    """Whether the selector may be asked now: not soon after it chose fewer than wanted.

    One that chose nobody is asked again earlier where a device came or became free.
    """
    if work.now >= state.run.select_after_unix_s:
        return True
    unwilling = state.clock.unwilling
    return unwilling is not None and work.now >= unwilling[1] and unwilling[0] != _there(state, fleet)


def _there(state: RunState, fleet: FleetView) -> tuple[int, int]:
    """Changes where a device came, or became free."""
    return fleet.arrivals(state.need), state.clock.freed


def _is_news(state: RunState, report: Report) -> bool:
    """Whether a report is worth keeping: it chose somebody, or gives other reasons than the last one of its round."""
    from coordinator.scheduling.explaining import reasons

    round_, clock = state.run.round, state.clock
    if report.chosen:
        clock.told = None
        return True
    said = reasons(report)
    if clock.told_round != round_:
        clock.told_round, clock.told_count, clock.told = round_, 0, None
    if said == clock.told or clock.told_count >= NOBODY_KEPT:
        return False
    clock.told, clock.told_count = said, clock.told_count + 1
    return True


def why_busy(state: RunState, now: float, devices: Iterable[str]) -> dict[str, str]:
    """Why eligible devices are no candidates, by device."""
    waiting = {update.device for update in state.pending}
    reasons = {}
    for device in sorted(devices):
        history = state.histories.get(device)
        if device in state.busy:
            row = state.assignments[state.by_device[device][-1]]
            reasons[device] = f"at work on {row.assignment}" if not row.standing else "holds a standing assignment"
        elif device in waiting:
            reasons[device] = "its update waits for the next model"
        elif history is not None and history.not_before_unix_s > now:
            why = "declined" if history.declined else f"failed {counted(history.failures, 'time')} in a row"
            reasons[device] = f"{why}, left alone for another {duration(history.not_before_unix_s - now)}"
        else:
            reasons[device] = "was asked in this attempt already"
    return reasons


def observe(state: RunState, work: Work, device: str, outcome: Outcome) -> None:
    """Tells the selector how an assignment ended."""
    memory = dict(state.run.selector_memory)
    state.selector.observe(device, outcome, memory)
    if memory != state.run.selector_memory:
        state.run.selector_memory = memory
        work.save(state.run)


def blame(state: RunState, work: Work, row: e.AssignmentRow, reason: str) -> None:
    """An assignment brought no update that counts: the device's history and the selector learn it, once."""
    history = state.history(row.device)
    note_failed(history, work.now, state.patience_s)
    work.save(history)
    observe(state, work, row.device, Outcome(assignment=row, reason=reason))


def due(row: e.AssignmentRow) -> list[e.Effect]:
    """What tells a device its open assignment, or tells it again."""
    standing: list[e.Effect] = [e.SendStanding(copy.copy(row))] if row.standing else []
    return [*standing, e.SendJob(copy.copy(row))] if row.pulled or not row.standing else standing


def repeat_jobs(state: RunState, work: Work) -> None:
    """Tells all devices again what they are to do: their jobs may have been lost."""
    for row in state.assignments.values():
        if row.status == "open" and row.assigned_unix_s < work.now:
            work.out += due(row)


def _request(state: RunState, now: float, free: list[str], count: int, memory: dict[str, float]) -> RoundRequest:
    run = state.run
    return RoundRequest(
        run=run.run,
        round_=run.round,
        attempt=run.attempt,
        count=count,
        candidates=free,
        plan=state.plan,
        random=Random(f"{state.plan.seed}/{run.run}/{run.round}/{run.attempt}/{run.next_selection}"),
        history=state.histories,
        memory=memory,
        bundle=bytes.fromhex(run.bundle.sha256[:8]),
        up_bytes=_up_bytes(state),
        down_bytes=_down_bytes(state),
        expected_late=_late(state, now),
    )


def _late(state: RunState, now: float) -> list[tuple[float, float | None]]:
    """Jobs of earlier versions that are still open: seconds since each was given, and those that its device takes."""
    late = []
    for row in state.assignments.values():
        if row.status == "open" and not row.away and row.version < state.run.version:
            history = state.histories.get(row.device)  # none of a run that an older version began
            late.append((max(0.0, now - row.assigned_unix_s), None if history is None else history.elapsed_s))
    return late


def _assign(state: RunState, work: Work, fleet: FleetView, choice: Choice, mean_samples: float | None) -> None:
    run, rules = state.run, state.plan.participation
    standing = state.mode == "anarchic"
    most_s = rules.deadline_s
    role = _role(state, fleet, choice)
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
        epochs=choice.epochs if choice.steps is None and not standing else None,
        steps=choice.steps,
        variant=choice.variant,
        cut=choice.cut,
        codec=choice.codec,
        byte_budget=_budget(state, fleet, choice, role, mean_samples),
        assigned_unix_s=work.now,
        deadline_unix_s=work.now + (choice.deadline_s if 0 < choice.deadline_s <= most_s else most_s),
        role=role,
        standing=standing,
        sequence=-1 if standing else 0,
        selection=run.next_selection,
    )
    run.next_assignment += 1
    history = state.history(choice.device)
    if not standing:
        note_asked(history, run.round)
    state.add_assignment(row)
    work.save(run, row, history)
    work.out += due(row)


def _role(state: RunState, fleet: FleetView, choice: Choice) -> Role:
    """The selector's, where server method and device know it."""
    if choice.role == "trainer":
        return "trainer"
    device = fleet.get(choice.device)
    known = choice.role in state.method.roles and device is not None and choice.role in device.state.abilities
    return choice.role if known else "trainer"


def _budget(state: RunState, fleet: FleetView, choice: Choice, role: Role, mean_samples: float | None) -> int | None:
    """The selector's own budget, else the plan's; none for a codec that the plan knows nothing of."""
    uplink = state.plan.uplink
    if choice.byte_budget is not None or choice.codec != uplink.codec:
        return choice.byte_budget
    channels = state.method.channels if role == "trainer" else state.method.roles[role]
    samples = _samples(state, fleet, choice.device) if uplink.by_samples else None
    return update_budget(uplink, state.run.round, state.run.elements * len(channels), samples, mean_samples)


def renewed_budget(state: RunState, fleet: FleetView, row: e.AssignmentRow) -> int | None:
    """Of a new pull of a standing assignment: the plan's budget may change from round to round."""
    uplink = state.plan.uplink
    if not uplink.warmup_rounds or row.codec != uplink.codec:
        return row.byte_budget
    samples = _samples(state, fleet, row.device) if uplink.by_samples else None
    elements = state.run.elements * len(state.method.channels)
    return update_budget(uplink, state.run.round, elements, samples, _mean_samples(state, fleet))


def _up_bytes(state: RunState) -> int:
    """About the bytes of one update: the budget, else the mean of those that came, else as float32."""
    elements = state.run.elements * len(state.method.channels)
    budget = update_budget(state.plan.uplink, state.run.round, elements)
    if budget is not None:
        return budget
    sizes = [row.blob.size_bytes for row in state.updates.values() if row.counted_round is not None]
    return sum(sizes) // len(sizes) if sizes else FLOAT_BYTES * elements


def _down_bytes(state: RunState) -> int:
    run = state.run
    change = state.changes.get(run.version) if run.vector_sha256 is not None else None
    return (change or run.down or run.model).size_bytes


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
    row = state.histories.get(device)
    return None if row is None else row.samples


def outcome(row: e.AssignmentRow, meta: UpdateMeta, *, received_unix_s: float, counted_round: int) -> Outcome:
    """The outcome of an assignment whose update was taken in."""
    return Outcome(
        assignment=row,
        meta=meta,
        elapsed_s=received_unix_s - row.assigned_unix_s,
        staleness=counted_round - row.version,
    )
