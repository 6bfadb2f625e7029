"""What the round machine remembers of one run: its recent rows, and counters over them that make every step O(1).

Everything but the rows is derived, so a state rebuilt from stored rows equals the live one. Assignments and updates
stay in memory for ``max_staleness + 1`` versions; older ones are answered from the store. A standing assignment stays
as long as it is open, with the update of its last pull. Histories of devices stay for the whole run.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.aggregation import create_method
from coordinator.chain import cheapest_base
from coordinator.events import AssignmentRow, HistoryRow, HoldingRow, RoundRow, RunRow, TableRow, UpdateRow
from coordinator.fleet import requirement
from coordinator.histories import LONGEST_DECLINE_S
from coordinator.scheduling import SELECTORS
from edge_runtime.messages import ModelRef

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.aggregation import ServerMethod
    from coordinator.events import AssignmentStatus, Pulled, Row
    from coordinator.fleet import Requirement
    from coordinator.plan import Plan
    from coordinator.scheduling import Selector
    from edge_runtime.messages import BlobRef, UpdateId


NO_LIMIT = 1 << 30  # of devices


class Clock:
    """What a state noticed on its way: the time of the last event, and when there is something to look for again.

    ``freed`` counts how often an assignment ended or devices became free otherwise. ``nobody`` is what was there when
    no device could be asked: arrivals in the fleet, ``freed``, when the first device that is kept waiting comes back,
    and whether one of them waits since it failed. ``next_expiry_s``: no assignment has its deadline before that.
    ``early``: pulls that are answered later, by assignment, and ``early_due``: when, as a heap; devices say them again.
    ``unwilling``: what was there when the selector chose nobody, and when it may be asked again if that changes.
    ``told`` are the reasons of the last stored selection if that chose nobody, ``told_count`` how many such are stored
    of round ``told_round``.
    """

    __slots__ = (
        *("early", "early_due", "freed", "next_expiry_s", "nobody", "now"),
        *("told", "told_count", "told_round", "unwilling"),
    )

    def __init__(self) -> None:
        self.now = -math.inf
        self.freed = 0
        self.nobody: tuple[int, int, float, bool] | None = None
        self.next_expiry_s = -math.inf
        self.early: dict[str, Pulled] = {}
        self.early_due: list[tuple[float, str]] = []
        self.unwilling: tuple[tuple[int, int], float] | None = None
        self.told: bytes | None = None
        self.told_count = 0
        self.told_round = -1


@dataclass
class RunState:
    """One run in memory. Make it by :meth:`start` or :meth:`from_rows`; :func:`coordinator.rounds.step` drives it."""

    plan: Plan
    run: RunRow
    need: Requirement
    method: ServerMethod = field(compare=False)
    selector: Selector = field(compare=False)
    assignments: dict[str, AssignmentRow] = field(default_factory=dict)
    updates: dict[UpdateId, UpdateRow] = field(default_factory=dict)
    unevaluated: dict[int, RoundRow] = field(default_factory=dict)  # by version, those that are to be evaluated
    changes: dict[int, BlobRef] = field(default_factory=dict)  # of the shared model, by the version that they make
    held: dict[str, int] = field(default_factory=dict)  # version of the shared model, by device that has one
    histories: dict[str, HistoryRow] = field(default_factory=dict)  # by device that was ever asked
    table: dict[str, TableRow] = field(default_factory=dict)  # by device that has a row
    # Derived from the rows:
    by_device: dict[str, list[str]] = field(default_factory=dict)  # assignments, oldest first
    by_assignment: dict[str, list[UpdateId]] = field(default_factory=dict)  # sorted
    busy: dict[str, int] = field(default_factory=dict)  # open assignments of a device
    asked: set[str] = field(default_factory=set)  # asked in this attempt of a round, or with an update in it
    pending: dict[UpdateId, UpdateRow] = field(default_factory=dict)
    fresh: int = 0  # updates of the current version for this round
    late: int = 0  # updates of earlier versions for this round
    open_round: int = 0  # open assignments of this round
    open_attempt: int = 0  # those of them that this attempt made, of devices that are not away
    at_work: int = 0  # open assignments of any round, of devices that are not away
    pulls: int = 0  # standing assignments of which an update is still to come
    # What makes a step cheap, and may be forgotten at any time:
    clock: Clock = field(default_factory=Clock, compare=False)

    @classmethod
    def start(
        cls,
        run_id: str,
        plan: Plan,
        bundle: BlobRef,
        model: BlobRef,
        *,
        now: float = 0.0,
        test_set: BlobRef | None = None,
        down: BlobRef | None = None,
        vector_sha256: str | None = None,
        method_state: BlobRef | None = None,
        elements: int = 0,
    ) -> RunState:
        """A new run; store ``state.run``, then carry out :func:`coordinator.rounds.resume`.

        Raises:
            PluginError: the plan names a selector or server method that is not there.
        """
        row = RunRow(
            run=run_id,
            model=model,
            bundle=bundle,
            initial_model=model,
            initial_method_state=method_state,
            test_set=test_set,
            down=down,
            vector_sha256=vector_sha256,
            method_state=method_state,
            elements=elements,
            submitted_unix_s=now,
            opened_unix_s=now,
        )
        return cls.from_rows(plan, [row])

    @classmethod
    def from_rows(cls, plan: Plan, rows: Iterable[Row]) -> RunState:
        """The run as it was when these rows were stored; rows of forgotten versions are skipped.

        Raises:
            PluginError: the plan names a selector or server method that is not there.
            ValueError: there is not exactly one run row.
        """
        rows = list(rows)
        (run,) = [row for row in rows if isinstance(row, RunRow)]
        method = create_method(plan)
        model_bytes = run.initial_model.size_bytes * len(method.down_channels)
        state = cls(
            plan=plan,
            run=run,
            need=requirement(plan, max(run.bundle.size_bytes, model_bytes)),
            method=method,
            selector=SELECTORS.create(plan.participation.selector, plan.participation.selector_options),
        )
        assignments = [row for row in rows if isinstance(row, AssignmentRow) and state.remembers(row)]
        for assignment in sorted(assignments, key=lambda row: _number(row.assignment)):
            state.add_assignment(assignment)
        for update in rows:
            if isinstance(update, UpdateRow) and state.is_known(update.update):
                state.add_update(update)
        for row in rows:
            if isinstance(row, RoundRow):
                state.add_round(row)
            elif isinstance(row, HoldingRow) and row.version is not None:
                state.held[row.device] = row.version
            elif isinstance(row, HistoryRow):
                state.histories[row.device] = row
            elif isinstance(row, TableRow):
                state.table[row.device] = row
        return state

    @property
    def mode(self) -> str:
        """The plan's mode of participation."""
        return self.plan.participation.mode

    @property
    def places(self) -> int:
        """How many devices a round wants at work, or how many are to be at work at any time in a run without rounds.

        In an anarchic run without ``concurrency`` all there are.
        """
        rules = self.plan.participation
        if self.mode == "synchronous":
            return self.run.places or math.ceil(rules.target * rules.over_commit)
        if self.mode == "anarchic":
            return rules.concurrency or NO_LIMIT
        return rules.concurrency or math.ceil(rules.target * rules.over_commit)

    @property
    def goal(self) -> int:
        """So many updates of the current version close a round: the selector's own number, else the plan's target.

        Never more than were chosen.
        """
        rules, run = self.plan.participation, self.run
        if not run.places:
            return rules.target
        return min(rules.target, max(rules.minimum, min(run.wanted or rules.target, run.places)))

    def remembers(self, row: AssignmentRow) -> bool:
        """Whether an assignment is recent enough, or still open."""
        return row.version >= self.oldest_version or row.status == "open"

    def is_known(self, update: UpdateId) -> bool:
        """Whether an update belongs to the rows that are remembered: of a standing assignment, only its last."""
        row = self.assignments.get(update.assignment)
        return row is not None and (not row.standing or update.sequence == row.sequence)

    def history(self, device: str) -> HistoryRow:
        """The history of a device, made if it has none yet."""
        row = self.histories.get(device)
        if row is None:
            row = self.histories[device] = HistoryRow(run=self.run.run, device=device)
        return row

    def bound_times(self, now: float, back_s: float = 0.0) -> list[Row]:
        """After the clock was set back: no time lies further ahead than it could; the rows that changed.

        Args:
            now: unix seconds by the clock as it is.
            back_s: by how much it was set back, where that is known; then what is ahead moves with it.
        """
        changed: list[Row] = []
        deadline_s = self.plan.participation.deadline_s

        def move(row: Row, **latest: float) -> None:
            before = {name: getattr(row, name) for name in latest}
            after = {
                name: value if value is None or value <= now else min(max(now, value - back_s), latest[name])
                for name, value in before.items()
            }
            if after != before:
                changed.append(row)
                for name, value in after.items():
                    setattr(row, name, value)

        move(self.run, deadline_unix_s=now + self.silence_s, select_after_unix_s=now + self.patience_s)
        move(self.run, opened_unix_s=now, short_since_unix_s=now)
        for row in self.assignments.values():
            if row.status == "open":
                move(row, assigned_unix_s=now, deadline_unix_s=now + deadline_s)
        for history in self.histories.values():
            move(history, not_before_unix_s=now + LONGEST_DECLINE_S)
        self.clock = Clock()
        return changed

    @property
    def oldest_version(self) -> int:
        """The oldest version whose assignments are remembered: one more than may count, to repeat its verdicts."""
        return self.run.version - self.plan.participation.max_staleness - 1

    @property
    def oldest_change(self) -> int:
        """Changes up to this version are forgotten: no assignment remembered can name them."""
        return self.oldest_version - self.plan.downlink.chain

    @property
    def ended(self) -> bool:
        """Whether the run has its final status."""
        return self.run.status != "running"

    @property
    def patience_s(self) -> float:
        """How long a round waits for missing devices before it starts with fewer than ``target``."""
        return self.plan.participation.deadline_s / 10

    @property
    def silence_s(self) -> float:
        """How long the next update may take: in an anarchic run a device may begin an interval after its last pull."""
        rules = self.plan.participation
        return rules.deadline_s + (rules.interval_s if self.mode == "anarchic" else 0.0)

    def is_evaluated(self, version: int) -> bool:
        """Whether the plan wants this version evaluated: the initial one, every n-th and the last."""
        last = version == self.plan.rounds
        return self.plan.test_set is not None and (last or version % self.plan.evaluate_every == 0)

    def evaluations_due(self) -> dict[int, BlobRef]:
        """Versions made so far that are still to be evaluated, oldest first, and their models."""
        due = {version: row.model for version, row in sorted(self.unevaluated.items())}
        if self.is_evaluated(0) and self.run.initial_test is None:
            due = {0: self.run.initial_model, **due}
        return due

    def base_for(self, device: str) -> int | None:
        """The version from which a device comes to the current one with the fewest bytes; None: by the whole model."""
        run = self.run
        if run.vector_sha256 is None:
            return None
        return self._cheapest_base(run.version, self.held.get(device), run.down or run.model)

    def base_without_held(self, row: AssignmentRow) -> int | None:
        """Where the device of an assignment starts if it holds nothing: 0, or None for the whole model."""
        return self._cheapest_base(row.version, None, row.model)

    def _cheapest_base(self, version: int, held: int | None, whole: BlobRef) -> int | None:
        oldest = self.run.version - self.plan.downlink.chain
        sizes = {made: change.size_bytes for made, change in self.changes.items() if made > oldest}
        return cheapest_base(version, held, sizes, whole.size_bytes)

    def model_of(self, row: AssignmentRow) -> ModelRef:
        """How the device of an assignment comes to its model."""
        if row.base_version is None:
            return ModelRef(blobs=[row.model], vector_sha256=row.vector_sha256)
        versions = range(row.base_version + 1, row.version + 1)
        blobs = [self.changes[version] for version in versions]
        return ModelRef(base=row.base_version, blobs=blobs, vector_sha256=row.vector_sha256)

    def needs_change(self, version: int) -> bool:
        """Whether the change that makes this version may still be asked for."""
        if version > self.run.version - self.plan.downlink.chain:
            return not self.ended
        return any(
            row.status == "open"
            and (row.pulled or not row.standing)
            and row.base_version is not None
            and row.base_version < version <= row.version
            for row in self.assignments.values()
        )

    def hold(self, row: AssignmentRow, version: int | None) -> HoldingRow | None:
        """Notes which version the device of an assignment holds after it (None: nobody knows); the row, if it is news.

        An assignment that was followed by another one of this device says nothing any more.
        """
        if row.vector_sha256 is None or self.by_device.get(row.device, [""])[-1] != row.assignment:
            return None
        if self.held.get(row.device) == version:
            return None
        if version is None:
            del self.held[row.device]
        else:
            self.held[row.device] = version
        return HoldingRow(run=row.run, device=row.device, version=version)

    def taken(self, assignment: str) -> UpdateRow | None:
        """The one update of an assignment that was taken in, if there is one."""
        for name in self.by_assignment.get(assignment, ()):
            if self.updates[name].counted_round is not None:
                return self.updates[name]
        return None

    def add_round(self, row: RoundRow) -> None:
        """Remembers of a closed round what is still needed."""
        if row.test is None and self.is_evaluated(row.version):
            self.unevaluated[row.version] = row
        if row.change is not None and row.version > self.oldest_change:
            self.changes[row.version] = row.change

    def add_assignment(self, row: AssignmentRow) -> None:
        """Remembers an assignment and counts it."""
        self.assignments[row.assignment] = row
        self.by_device.setdefault(row.device, []).append(row.assignment)
        if self._was_asked(row):
            self.asked.add(row.device)
        self.pulls += row.pulled
        if row.status == "open":
            self.busy[row.device] = self.busy.get(row.device, 0) + 1
            self._count_open(row, 1)

    def close_assignment(self, row: AssignmentRow, status: AssignmentStatus, reason: str = "") -> None:
        """Gives an assignment its end and frees its device."""
        if row.status == "open":
            self._count_open(row, -1)
            self.busy[row.device] -= 1
            if not self.busy[row.device]:
                del self.busy[row.device]
            self.clock.freed += 1
        self.end_pull(row, reason)
        row.status = status
        if self.mode == "synchronous" and row.round == self.run.round:
            if status == "received":
                self.asked.add(row.device)
            elif status == "declined":  # it is kept waiting instead, and may be asked again in this attempt
                self.asked.discard(row.device)

    def pull(
        self, row: AssignmentRow, *, sequence: int, steps: int, assigned_unix_s: float, deadline_unix_s: float
    ) -> None:
        """Begins a new update of a standing assignment, from the newest model."""
        run = self.run
        self._count_open(row, -1)
        self.pulls += not row.pulled
        row.round, row.attempt, row.version = run.round, run.attempt, run.version
        row.model, row.vector_sha256 = run.down or run.model, run.vector_sha256
        row.base_version = self.base_for(row.device)
        row.sequence, row.steps, row.pulled, row.reason, row.away = sequence, steps, True, "", False
        row.assigned_unix_s, row.deadline_unix_s = assigned_unix_s, deadline_unix_s
        self._count_open(row, 1)

    def end_pull(self, row: AssignmentRow, reason: str = "") -> None:
        """The last pull of a standing assignment brought its update, or will bring none for this reason."""
        self.pulls -= row.pulled
        row.pulled, row.reason = False, reason

    def set_away(self, row: AssignmentRow, away: bool) -> None:
        """Notes of an open assignment whether its place may be given on."""
        self._count_open(row, -1)
        row.away = away
        self._count_open(row, 1)

    def _count_open(self, row: AssignmentRow, sign: int) -> None:
        current = self.mode == "synchronous" and row.round == self.run.round
        self.open_round += sign * current
        self.open_attempt += sign * (current and row.attempt == self.run.attempt and not row.away)
        self.at_work += sign * (not row.away)
        if sign > 0 and not row.away and not row.standing:
            self.clock.next_expiry_s = min(self.clock.next_expiry_s, row.deadline_unix_s)

    def _was_asked(self, row: AssignmentRow) -> bool:
        """Whether the device of an assignment is not asked again in this attempt of a round."""
        if self.mode != "synchronous" or row.round != self.run.round:
            return False
        return row.status == "received" or (row.attempt == self.run.attempt and row.status != "declined")

    def add_update(self, row: UpdateRow) -> None:
        """Remembers an update and counts it."""
        self.updates[row.update] = row
        insort(self.by_assignment.setdefault(row.update.assignment, []), row.update)
        if row.verdict == "pending":
            self.pending[row.update] = row
            if row.counted_round == self.run.round:
                fresh = self.assignments[row.update.assignment].version == self.run.version
                self.fresh += fresh
                self.late += not fresh

    def recount(self) -> None:
        """Counts again after the round or the attempt changed."""
        run = self.run
        self.asked = set()
        self.fresh = self.late = self.open_round = self.open_attempt = self.at_work = 0
        self.clock.freed += 1
        for row in self.assignments.values():
            if self._was_asked(row):
                self.asked.add(row.device)
            if row.status == "open":
                self._count_open(row, 1)
        for update in self.pending.values():
            if update.counted_round == run.round:
                fresh = self.assignments[update.update.assignment].version == run.version
                self.fresh += fresh
                self.late += not fresh

    def prune(self) -> None:
        """Forgets closed assignments, and their updates, that are too old to matter."""
        for name in [name for name, row in self.assignments.items() if not self.remembers(row)]:
            row = self.assignments.pop(name)
            self.forget_updates(name)
            names = self.by_device[row.device]
            names.remove(name)
            if not names:
                del self.by_device[row.device]
        for version in [version for version in self.changes if version <= self.oldest_change]:
            del self.changes[version]

    def forget_updates(self, assignment: str) -> None:
        """Forgets the updates of an assignment, all with a verdict; they are answered from the store."""
        for update in self.by_assignment.pop(assignment, ()):
            del self.updates[update]


def _number(assignment: str) -> int:
    return int(assignment.rpartition("-")[2])
