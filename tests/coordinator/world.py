"""A small world around the round machine: devices, a lossy network, a database, a worker, and crashes of the server.

Everything random comes from a list of integers, so that a failure shrinks and replays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

import msgspec

from coordinator import events as e
from coordinator.fleet import Fleet
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from edge_runtime.messages import BlobRef, Evaluation, ModelRef, UpdateId, UpdateMeta
from tests.coordinator import helpers as h


class CrashError(Exception):
    """The server dies between two effects."""


@dataclass
class Device:
    """``holds`` is the shared model that it has: version and hash; ``lost``: it had another one, and forgot it.

    ``standing`` has the number of the next update of each standing assignment.
    """

    name: str
    online: bool = True
    session: int = 0
    holds: tuple[int, str] | None = None
    lost: bool = False
    jobs: dict[tuple[str, int], tuple[e.AssignmentRow, ModelRef]] = field(default_factory=dict)
    finished: set[tuple[str, int]] = field(default_factory=set)  # assignments trained, failed or cancelled
    standing: dict[str, int] = field(default_factory=dict)
    spool: dict[UpdateId, tuple[BlobRef, UpdateMeta]] = field(default_factory=dict)


class World:
    """One run and its surroundings. ``rows`` is the database, ``wire`` what is on its way to the server.

    With ``lossy`` devices hold versions of a shared model; ``changes`` are the blobs that lead from one to the next.
    """

    def __init__(self, plan, names, *, lossy: bool = False) -> None:
        self.plan = plan
        self.now = 0.0
        self.devices = {name: Device(name) for name in names}
        self.fleet = Fleet()
        self.rows: dict[tuple, e.Row] = {}
        self.wire: list[e.Event] = []
        self.work: list[e.Event] = []
        self.history: list[e.Event] = []
        self.crash_after: int | None = None
        self.drop_next = False
        self.aggregates: dict[int, list[tuple[UpdateId, float]]] = {}
        self.aggregated: dict[int, str] = {}
        self.done: set[UpdateId] = set()
        self.verdicts: dict[UpdateId, bool] = {}
        self.finished: list[e.Finished] = []
        self.failed_steps = 0
        self.start_vector = sha256(b"start").hexdigest()
        self.changes: dict[str, tuple[str, str]] = {}  # hash of the blob -> hashes of the models before and after
        self.deleted: set[str] = set()
        self.ways: list[tuple[int | None, int]] = []  # base and version of the jobs that devices began
        vector = self.start_vector if lossy else None
        self.state = RunState.start("run", plan, h.blob(1), h.blob(2, 5000), vector_sha256=vector, elements=1000)
        self.save([self.state.run])
        for device in self.devices.values():
            self.fleet.announce(self.now, self.announcement(device))
        self.carry_out(resume(self.state))

    def announcement(self, device):
        return h.device(device.name, online=device.online, session=str(device.session), abilities=["standing"])

    # The server
    def event(self, event: e.Event) -> None:
        self.history.append(event)
        try:
            effects = step(self.state, event, self.fleet)
            self.check_order(effects)
            self.carry_out(effects)
        except CrashError:
            self.restart()
        if self.crash_after is None:
            self.check_rebuilt()
            self.clean()

    def clean(self) -> None:
        """What the server does after a round: changes that nobody needs any more go."""
        for key, row in self.rows.items():
            if key[0] is e.RoundRow and row.change is not None and not self.state.needs_change(row.version):
                self.deleted.add(row.change.sha256)

    def restart(self) -> None:
        """A new server process: nothing is left but the rows; work in flight is lost."""
        self.crash_after = None
        self.work.clear()
        self.wire = [event for event in self.wire if not isinstance(event, e.UpdateArrived)]
        self.state = RunState.from_rows(self.plan, [copy.copy(row) for row in self.rows.values()])
        self.carry_out(resume(self.state))

    def check_order(self, effects) -> None:
        kinds = [type(effect) for effect in effects]
        assert kinds.count(e.Save) <= 1
        assert e.Save not in kinds[1:]

    def check_rebuilt(self) -> None:
        rebuilt = RunState.from_rows(self.plan, self.rows.values())
        for name in self.state.__dataclass_fields__:
            if name not in ("method", "selector", "clock"):
                assert getattr(rebuilt, name) == getattr(self.state, name), name

    def save(self, rows) -> None:
        for row in rows:
            key = {
                e.RunRow: lambda row: (row.run,),
                e.AssignmentRow: lambda row: (row.run, row.assignment),
                e.UpdateRow: lambda row: (row.update,),
                e.LedgerRow: lambda row: (row.run, row.device, row.assignment, row.sequence),
                e.HoldingRow: lambda row: (row.run, row.device),
                e.RoundRow: lambda row: (row.run, row.round),
                e.HistoryRow: lambda row: (row.run, row.device),
                e.TableRow: lambda row: (row.run, row.device),
                e.SelectionRow: lambda row: (row.run, row.number),
            }[type(row)](row)
            before = self.rows.get((type(row), *key))
            if isinstance(before, e.UpdateRow) and before.verdict != "pending":
                assert row == before, "a verdict changed"
            self.rows[(type(row), *key)] = copy.copy(row)

    def carry_out(self, effects) -> None:
        for effect in effects:
            if self.crash_after is not None:
                if self.crash_after == 0:
                    raise CrashError
                self.crash_after -= 1
            getattr(self, f"on_{type(effect).__name__}")(effect)

    def on_Save(self, effect):  # noqa: N802
        self.save(effect.rows)

    def reaches(self, name):
        dropped, self.drop_next = self.drop_next, False
        return name in self.devices and self.devices[name].online and not dropped

    def on_SendJob(self, effect):  # noqa: N802
        row = effect.assignment
        stored = self.rows[e.AssignmentRow, row.run, row.assignment]
        assert (stored.device, stored.version, stored.model) == (row.device, row.version, row.model)
        model = self.state.model_of(row)
        assert not self.deleted & {blob.sha256 for blob in model.blobs}, "a job names a change that was deleted"
        if not self.reaches(row.device):
            return
        device, name = self.devices[row.device], (row.assignment, row.sequence)
        if name in device.finished:
            return
        if model.base and not device.lost and name not in device.jobs:
            assert device.holds is not None, "the coordinator thought that a device holds what it never had"
            assert device.holds[0] == model.base
        if self.vector_of(device, model) is None:
            device.jobs.pop(name, None)
            self.wire.append(e.JobReported(self.now, row.device, row.assignment, "lacks the base", rejected=True))
        else:
            device.jobs[name] = (row, model)

    def on_SendStanding(self, effect):  # noqa: N802
        row = effect.assignment
        assert self.rows[e.AssignmentRow, row.run, row.assignment].standing
        if self.reaches(row.device):
            standing = self.devices[row.device].standing
            standing[row.assignment] = max(standing.get(row.assignment, 0), row.sequence + (not row.pulled))

    def pull(self, device, flavour: int) -> None:
        """The device chooses its moment, and how many steps it takes; some ask for what they may not have."""
        if device.standing and not device.spool and device.online:
            assignment, sequence = next(iter(device.standing.items()))
            sequence = max(0, sequence + {3: 1, 4: -1}.get(flavour % 9, 0))
            steps = (1, 7, 1000)[flavour % 3]
            self.wire.append(e.Pulled(self.now, device.name, assignment, sequence, steps))

    def vector_of(self, device, model):
        """What comes out on the device (checked against what must); None if it lacks the version to start from."""
        if model.vector_sha256 is None or model.base is None:
            assert len(model.blobs) == 1
            return model.vector_sha256 or ""
        if model.base == 0:
            vector = self.start_vector
        elif device.holds is not None and device.holds[0] == model.base:
            vector = device.holds[1]
        else:
            return None
        for blob in model.blobs:
            before, after = self.changes[blob.sha256]
            assert before == vector, "a change for another version"
            vector = after
        assert vector == model.vector_sha256
        return vector

    def on_SendCancel(self, effect):  # noqa: N802
        if self.reaches(effect.device):
            device = self.devices[effect.device]
            device.standing.pop(effect.assignment, None)
            device.jobs = {name: job for name, job in device.jobs.items() if name[0] != effect.assignment}

    def on_Fetch(self, effect):  # noqa: N802
        assert (e.UpdateRow, effect.update) not in self.rows
        kind = e.UpdateArrived
        if effect.meta.loss == 99.0:
            self.wire.append(e.UpdateDamaged(self.now, effect.update, effect.blob, effect.meta, "holds NaN"))
        else:
            self.wire.append(kind(self.now, effect.update, effect.blob, effect.meta))

    def on_SendDone(self, effect):  # noqa: N802
        row = self.rows[e.UpdateRow, effect.update]
        assert row.verdict != "refused" or row.reason.startswith("run has ended")
        self.done.add(effect.update)

    def on_SendVerdict(self, effect):  # noqa: N802
        assert self.verdicts.setdefault(effect.update, effect.counted) == effect.counted
        if effect.counted:
            assert self.rows[e.UpdateRow, effect.update].verdict == "counted"
        if self.reaches(effect.update.device):
            self.devices[effect.update.device].spool.pop(effect.update, None)

    def on_AnswerFromStore(self, effect):  # noqa: N802
        row = self.rows.get((e.UpdateRow, effect.update))
        if row is None:
            self.on_SendVerdict(e.SendVerdict(effect.update, counted=False, reason="unknown"))
        elif row.verdict != "pending":
            self.on_SendVerdict(e.SendVerdict(effect.update, counted=row.verdict == "counted", reason=row.reason))

    def on_Aggregate(self, effect):  # noqa: N802
        content = [(row.update, row.weight) for row in effect.updates]
        assert content == sorted(content)
        assert len(content) >= self.plan.participation.minimum
        assert self.aggregates.setdefault(effect.round, content) == content, "an aggregate changed"
        digest = sha256(repr((effect.base.sha256, content)).encode()).hexdigest()
        event = e.Aggregated(self.now, effect.round, BlobRef(sha256=digest, size_bytes=5000))
        before = self.state.run.vector_sha256
        if before is not None:
            assert effect.version in effect.held
            assert {row.meta.model_version for row in effect.updates} <= effect.held.keys()
            change, vector, down = (sha256(f"{kind}{digest}".encode()).hexdigest() for kind in ("c", "v", "d"))
            self.changes[change] = (before, vector)
            event = msgspec.structs.replace(
                event,
                down=BlobRef(sha256=down, size_bytes=2000),
                change=BlobRef(sha256=change, size_bytes=int(digest[:2], 16) * 4),
                vector_sha256=vector,
            )
        self.work.append(event)

    def on_Evaluate(self, effect):  # noqa: N802
        self.work.append(e.Evaluated(self.now, effect.version, Evaluation(samples=4, loss_sum=1.0, correct=2)))

    def on_Finished(self, effect):  # noqa: N802
        self.finished.append(effect)

    # The surroundings
    def join(self, device, *, wiped: bool = False) -> None:
        if wiped:
            device.holds, device.lost = None, True
        device.online = True
        device.session += 1
        if self.fleet.announce(self.now, self.announcement(device)):
            self.event(e.DeviceJoined(self.now, device.name))

    def leave(self, device) -> None:
        device.online = False
        self.fleet.announce(self.now, self.announcement(device))
        self.event(e.DeviceLeft(self.now, device.name))

    def train(self, device, flavour: int) -> None:
        """Finishes the oldest job: mostly well, sometimes not. It waits for the verdict on the update before."""
        if not device.jobs:
            self.pull(device, flavour)
        if not device.jobs or device.spool:
            return
        name, (row, model) = next(iter(device.jobs.items()))
        del device.jobs[name]
        vector = self.vector_of(device, model)
        if vector is None:  # another job came in between
            self.wire.append(e.JobReported(self.now, device.name, name[0], "lacks the base", rejected=True))
            return
        device.finished.add(name)
        if row.standing:
            device.standing[name[0]] = max(device.standing.get(name[0], 0), name[1] + 1)
        self.ways.append((model.base, row.version))
        if model.vector_sha256 is not None:
            device.holds, device.lost = (row.version, vector), False
        if flavour % 7 == 5:
            self.wire.append(e.JobReported(self.now, device.name, name[0], "too hot"))
            return
        if flavour % 11 == 6:
            declined = e.JobReported(
                self.now, device.name, name[0], "only at night", rejected=True, declined_s=(0.0, 40.0, 1e9)[flavour % 3]
            )
            self.wire.append(declined)
            return
        changes = {1: {"samples": 0}, 2: {"loss": 99.0}, 3: {"model_version": 77}}.get(flavour % 17, {})
        for sequence in [row.sequence] if row.standing else range(1 + (flavour % 19 == 4)):
            blob = h.blob(1000 * int(name[0].rpartition("-")[2]) + sequence)
            device.spool[h.update_id(row, sequence)] = (blob, h.meta(row, **changes))

    def offer(self, device, pick: int) -> None:
        if device.spool and device.online:
            update = list(device.spool)[pick % len(device.spool)]
            blob, meta = device.spool[update]
            self.wire.append(e.UpdateOffered(self.now, update, blob, meta))

    def deliver(self, index: int) -> None:
        if self.wire:
            self.event(self.wire.pop(index % len(self.wire)))

    def act(self, number: int) -> None:
        """One random happening."""
        action, pick = number % 20, number // 20
        device = list(self.devices.values())[pick % len(self.devices)]
        pick //= len(self.devices)
        match action:
            case 0 | 1:
                self.now += (0.1, 3.0, 30.0, 120.0)[pick % 4]
                self.event(e.Tick(self.now))
            case 2:
                self.leave(device) if device.online else self.join(device)
            case 3:
                self.join(device, wiped=pick % 3 == 0)
            case 4 | 5 | 6:
                self.train(device, pick)
            case 7 | 8 | 9:
                self.offer(device, pick)
            case 10 | 11 | 12:
                self.deliver(pick)
            case 13 if self.wire:
                self.wire.pop(pick % len(self.wire))
            case 14 | 15 if self.work:
                self.event(self.work.pop(pick % len(self.work)))
            case 16 if self.history:
                self.event(self.history[pick % len(self.history)])
            case 17:
                self.crash_after = pick % 4
            case 18:
                self.restart()
            case 19:
                self.odd(pick)

    def odd(self, pick: int) -> None:
        """Things that should not happen, and a stop."""
        match pick % 12:
            case 0:
                self.event(e.StopRequested(self.now))
            case 1 if self.state.assignments:  # somebody else's assignment
                row = list(self.state.assignments.values())[pick % len(self.state.assignments)]
                update = UpdateId("run", "stranger", row.assignment, 0)
                self.event(e.UpdateArrived(self.now, update, h.blob(5), h.meta(row)))
            case 2:
                meta = UpdateMeta(round=0, model_version=0, samples=5, steps=1)
                self.event(e.UpdateOffered(self.now, UpdateId("run", "a", "r0-9999", 0), h.blob(5), meta))
            case 3:
                self.event(e.JobReported(self.now, "stranger", "r0-0", "x"))
            case 4:
                self.event(e.Aggregated(self.now, pick % 5 + 70, h.blob(6)))
            case _:
                self.drop_next = True

    def run_fairly(self, limit: int = 5000) -> None:
        """From here on everything arrives, devices work, time passes: the run must come to its end."""
        random = Random(1)
        self.drop_next = False
        for _ in range(limit):
            if self.state.ended and not self.wire and not any(device.spool for device in self.devices.values()):
                return
            for device in self.devices.values():
                if not device.online:
                    self.join(device)
                while device.jobs and not device.spool:
                    self.train(device, 0)
                self.pull(device, 0)
                for pick in range(len(device.spool)):
                    self.offer(device, pick)
            while self.wire:
                self.deliver(random.randrange(len(self.wire)))
            while self.work:
                self.event(self.work.pop(0))
            self.now += 11.0
            self.event(e.Tick(self.now))
        raise AssertionError("the run did not end")

    def check_end(self) -> None:
        updates = [row for key, row in self.rows.items() if key[0] is e.UpdateRow]
        rounds = {row.round: row for key, row in self.rows.items() if key[0] is e.RoundRow}
        counted = sorted((row.counted_round, row.update) for row in updates if row.verdict == "counted")
        in_models = sorted((round_, update) for round_ in rounds for update, _ in self.aggregates[round_])
        assert counted == in_models
        assert len({update for _, update in counted}) == len(counted)
        standing = {row.assignment for key, row in self.rows.items() if key[0] is e.AssignmentRow and row.standing}
        single = [update.assignment for _, update in counted if update.assignment not in standing]
        assert len(set(single)) == len(single)
        assert not [row for row in updates if row.verdict == "pending"]
        assert self.done <= {row.update for row in updates}
        assert not [key for key, row in self.rows.items() if key[0] is e.AssignmentRow and row.status == "open"]
        assert self.finished
        assert len({(end.status, end.reason) for end in self.finished}) == 1
        if self.finished[0].status == "finished":
            assert sorted(rounds) == list(range(self.plan.rounds))
        for row in updates:
            if row.verdict == "counted":
                assert 0 <= row.counted_round - row.meta.model_version <= self.plan.participation.max_staleness
