"""The coordinator of a simulated run: the real round machine, fleet and files, around a store in memory.

It does what :mod:`coordinator.server` and :mod:`coordinator.run_shell` do, without a network. A crash loses all but
the store; a new process begins from its rows and from the devices' retained states, as the real one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, cast

from coordinator import events as e
from coordinator.checking import damage
from coordinator.errors import ExecutorError
from coordinator.fleet import Fleet
from coordinator.job_message import make_job, make_standing
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from coordinator.runner import RunFiles
from coordinator.simulation.settings import CHUNK_BYTES, START_UNIX_S
from edge_runtime import messages
from edge_runtime.errors import EdgeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from coordinator.fleet import Device, FleetView
    from coordinator.scheduling import Selector
    from coordinator.scheduling.base import RoundRequest, Selection
    from coordinator.simulation.device import VirtualDevice
    from coordinator.simulation.store import MemoryStore
    from coordinator.simulation.world import World
    from coordinator.store import Store
    from edge_runtime.messages import BlobRef, Evaluation, UpdateId, UpdateMeta

EVALUATION_S = 1.0  # virtual time that an evaluation takes; meanwhile rounds go on
_OfferOf = tuple["UpdateId", "BlobRef", "UpdateMeta", "bytes | Path | None"]


class LookingFleet(Fleet):
    """A fleet whose heartbeats are made when a selector looks, as old as they would be: the same as if they came all
    the time, for a fraction of the work.
    """

    def __init__(self, refresh: Callable[[Device], None]) -> None:
        super().__init__()
        self._refresh = refresh
        self.is_looked_at = False

    def get(self, name: str) -> Device | None:
        device = super().get(name)
        if self.is_looked_at and device is not None and device.online:
            self._refresh(device)
        return device


class LookingSelector:
    """A selector that sees the newest heartbeats; everything else is the selector's own."""

    def __init__(self, selector: Selector, fleet: LookingFleet) -> None:
        self._selector, self._fleet = selector, fleet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        """See :class:`coordinator.scheduling.base.Selector`."""
        self._fleet.is_looked_at = True
        try:
            return self._selector.select(now, fleet, request)
        finally:
            self._fleet.is_looked_at = False


class VirtualServer:
    """``up``: its process lives. ``crash_in``: it dies before the effect of that number from now."""

    def __init__(self, world: World, store: MemoryStore, run: e.RunRow) -> None:
        self._world, self._store = world, store
        self.up = False
        self.crash_in: int | None = None
        self.steps = 0
        self._started_s = 0.0
        self._jumps: list[tuple[float, float]] = [(-math.inf, 0.0)]  # from then on its clock is off by so much
        self.bytes_up = self.bytes_down = 0.0
        self._moved = (0.0, 0.0)
        self._process = 0
        self._wanted: set[UpdateId] = set()  # whose bytes were asked for
        self._run = run.run
        self._whole: dict[int, BlobRef] = {}
        self.state: RunState | None = None
        self.fleet = LookingFleet(self._refresh)
        store.save([run])

    @property
    def now(self) -> float:
        """Unix seconds by its own clock."""
        return self._unix_s(self._world.timeline.now_s)

    def _unix_s(self, at_s: float) -> float:
        jumps = self._jumps
        if len(jumps) > 1 and at_s < jumps[-1][0]:
            return START_UNIX_S + at_s + jumps[bisect_right(jumps, (at_s, math.inf)) - 1][1]
        return START_UNIX_S + at_s + jumps[-1][1]

    def jump(self, jump_s: float) -> None:
        """Its clock is set, whether its process lives or not."""
        self._jumps.append((self._world.timeline.now_s, self._jumps[-1][1] + jump_s))

    def start(self) -> None:
        """A new process: the run from its rows, the fleet from the retained states of the devices."""
        self._process += 1
        self._started_s = self._world.timeline.now_s
        self.up = True
        self.crash_in = None
        self._wanted = set()
        state = RunState.from_rows(self._world.plan, self._store.load_run(self._run))
        self.files = RunFiles(cast("Store", self._store), self._world.plan, state.run, self._world.executor)
        if state.run.next_assignment:
            state.run.bytes_complete = False
        state.bound_times(self.now)
        self.fleet = LookingFleet(self._refresh)
        state.selector = LookingSelector(state.selector, self.fleet)  # type: ignore[assignment]
        self.state = None if state.ended else state
        joined = [
            device.name
            for device in self._world.devices
            if self.fleet.announce(self.now, device.announcement()) and self._process > 1
        ]
        self._begin(lambda: resume(state))
        for name in joined:
            self._step(e.DeviceJoined(self.now, name))
        self._step(e.Tick(self.now))

    def crash(self) -> None:
        """The process is gone."""
        self.up = False
        self.state = None
        self._world.server_crashed()

    def tick(self) -> None:
        """Once a second, or what the settings say."""
        if self.up and self.state is not None:
            self._step(e.Tick(self.now))
        self._world.timeline.at(self._world.timeline.now_s + self._world.settings.tick_s, self.tick)

    def stop(self, reason: str) -> None:
        """The run is to end now."""
        self._step(e.StopRequested(self.now, reason))

    @property
    def waits(self) -> bool:
        """Whether the run can go on only with devices that it has yet to find."""
        state = self.state
        if state is None or state.run.phase != "selecting":
            return False
        return all(row.status != "open" for row in state.assignments.values())

    def lost_broker(self) -> None:
        """All devices are gone, as far as it knows."""
        for device in list(self.fleet.devices()):
            self.fleet.gone(self.now, device.name)

    def whole_model(self, job: messages.Job) -> BlobRef:
        """The whole model of a job's version, as devices come to hold it."""
        return self._whole[job.model_version]

    def moved(self, size_bytes: float, *, up: bool) -> None:
        """Counts bytes of blobs."""
        if up:
            self.bytes_up += size_bytes
        else:
            self.bytes_down += size_bytes

    # What devices say

    def receive_state(self, state: messages.DeviceState) -> None:
        """The broker has a new state of a device."""
        if not (self.up and self._world.broker_up):
            return
        joined = self.fleet.announce(self.now, state)
        if not state.online:
            self._step(e.DeviceLeft(self.now, state.device))
        if joined:
            self._step(e.DeviceJoined(self.now, state.device))

    def receive(self, device: VirtualDevice, leaf: str, content: Any) -> None:
        """A message of a device arrived at the broker."""
        if not (self.up and self._world.broker_up):
            return
        self.fleet.contact(self.now, device.name)
        match leaf:
            case "state":
                self.receive_state(content)
            case "offer":
                self._offered(content)
            case "bytes":
                self._got_bytes(*content)
            case "status":
                self._reported(device.name, content)
            case "pull":
                self._step(e.Pulled(self.now, device.name, content.assignment, content.sequence, content.steps))

    def _offered(self, offer: _OfferOf) -> None:
        update, blob, meta, data = offer
        if self.state is None:
            self._carry_out(e.AnswerFromStore(update, ends=True))
            return
        self._pushed = (update, data)
        self._step(e.UpdateOffered(self.now, update, blob, meta))
        self._pushed = None

    def _reported(self, device: str, status: messages.JobStatus) -> None:
        rejected = status.status == "rejected"
        self._step(
            e.JobReported(
                self.now,
                device,
                status.assignment,
                status.reason,
                rejected,
                status.energy,
                status.declined_s,
            )
        )

    def _refresh(self, device: Device) -> None:
        """Takes in the newest heartbeat that has come since anybody looked."""
        virtual = self._world.by_name[device.name]
        conditions, latency_s = virtual.conditions, virtual.latency_s
        told_s = conditions.told_s(self._world.timeline.now_s - latency_s)
        came_unix_s = self._unix_s(max(told_s + latency_s, self._started_s))  # a new process gets what is retained
        if device.heartbeat_unix_s != came_unix_s:
            device.heard(came_unix_s, conditions.heartbeat(told_s))

    # The machine

    _pushed: tuple[UpdateId, bytes | Path | None] | None = None

    def _step(self, event: e.Event) -> None:
        state = self.state
        if state is None:
            return
        self.steps += 1
        self._world.faults.at_step(self.steps)
        self._begin(lambda: step(state, event, self.fleet))

    def _begin(self, effects: Callable[[], list[e.Effect]]) -> None:
        process = self._process
        for effect in effects():
            if self.crash_in is not None:
                if self.crash_in <= 0:
                    self.crash()
                    return
                self.crash_in -= 1
            self._carry_out(effect)
            if self._process != process or not self.up:
                return

    def _carry_out(self, effect: e.Effect) -> None:
        _EFFECTS[type(effect)](self, effect)

    def _save(self, effect: e.Save) -> None:
        self._store.save(effect.rows)
        self._world.recorder.saved(effect.rows)

    def _send(self, device: str, message: messages.FromCoordinator) -> None:
        virtual = self._world.by_name.get(device)
        if virtual is not None and virtual.connected:
            self._world.to_device(virtual, message)

    def _send_job(self, effect: e.SendJob) -> None:
        row, state = effect.assignment, self.state
        virtual = self._world.by_name[row.device]
        if state is None or not virtual.connected:
            return
        self._whole[row.version] = row.model
        job = make_job(self._world.plan, state.run, row, state.model_of(row), now=self.now, chunk_bytes=CHUNK_BYTES)
        self._world.to_device(virtual, job)

    def _send_standing(self, effect: e.SendStanding) -> None:
        if self.state is not None:
            message = make_standing(self._world.plan, self.state.run, effect.assignment, chunk_bytes=CHUNK_BYTES)
            self._send(effect.assignment.device, message)

    def _send_cancel(self, effect: e.SendCancel) -> None:
        self._send(
            effect.device,
            messages.Cancel(run=self._run, assignment=effect.assignment, reason=effect.reason),
        )

    def _send_done(self, effect: e.SendDone) -> None:
        self._send(effect.update.device, messages.Done(update=effect.update))

    def _send_verdict(self, effect: e.SendVerdict) -> None:
        message = messages.Verdict(update=effect.update, counted=effect.counted, reason=effect.reason, ends=effect.ends)
        self._world.recorder.told(effect.update, counted=effect.counted)
        self._send(effect.update.device, message)

    def _fetch(self, effect: e.Fetch) -> None:
        reason = self.files.unfit(effect.blob)
        timeline = self._world.timeline
        if reason:
            timeline.at(timeline.now_s, self._damaged, effect, reason, self._process)
        elif self._pushed is not None and self._pushed[0] == effect.update and self._pushed[1] is not None:
            data = self._pushed[1]
            timeline.at(timeline.now_s, self._verify, effect, data, self._process)
        else:
            self._wanted.add(effect.update)
            self._send(effect.update.device, messages.Need(sha256=effect.blob.sha256, ranges=[(0, 1)]))

    def _got_bytes(self, update: UpdateId, blob: BlobRef, meta: UpdateMeta, data: bytes | Path) -> None:
        if self.state is not None and update in self._wanted:  # else they came a second time
            self._wanted.discard(update)
            self._verify(e.Fetch(update, blob, meta), data, self._process)

    def _verify(self, effect: e.Fetch, data: bytes | Path, process: int) -> None:
        """The bytes are here: kept, and looked at as the real server does."""
        state = self.state
        if process != self._process or state is None:
            return
        self._store.blobs.put_named(effect.blob.sha256, data)
        row = state.assignments.get(effect.update.assignment)
        reason = "" if row is None else damage(self.files.check(effect.update, effect.blob, row))
        if reason:
            self.files.drop_damaged(effect.blob)
            self._damaged(effect, reason, process)
        else:
            self._step(e.UpdateArrived(self.now, effect.update, effect.blob, effect.meta))

    def _damaged(self, effect: e.Fetch, reason: str, process: int) -> None:
        if process == self._process:
            self._step(e.UpdateDamaged(self.now, effect.update, effect.blob, effect.meta, reason))

    def _answer_from_store(self, effect: e.AnswerFromStore) -> None:
        row = self._store.stored_verdict(effect.update)
        if row is None:
            reason = "its assignment is unknown here, or too long ago to count"
            message: messages.FromCoordinator = messages.Verdict(
                update=effect.update, counted=False, reason=reason, ends=effect.ends
            )
        elif row.verdict == "pending":
            message = messages.Done(update=effect.update)
        else:
            counted = row.verdict == "counted"
            message = messages.Verdict(update=effect.update, counted=counted, reason=row.reason, ends=effect.ends)
        self._send(effect.update.device, message)

    def _aggregate(self, effect: e.Aggregate) -> None:
        event: e.Event
        try:
            made = self.files.aggregate(effect)
            up, down = self._moved
            self._moved = self.bytes_up, self.bytes_down
            event = e.Aggregated(
                self.now,
                effect.round,
                **made._asdict(),
                bytes_up=round(self.bytes_up - up),
                bytes_down=round(self.bytes_down - down),
            )
        except ExecutorError:
            raise
        except EdgeError as error:
            event = e.WorkFailed(self.now, str(error))
        timeline = self._world.timeline
        timeline.at(timeline.now_s, self._done, event, list(effect.table.values()), self._process)

    def _done(self, event: e.Event, replaced: list[BlobRef], process: int) -> None:
        if process != self._process:
            return
        self._step(event)
        if isinstance(event, e.Aggregated) and self.state is not None and self.up:
            self.files.clean(self.state)
            self.files.drop_replaced(self.state, replaced)

    def _evaluate(self, effect: e.Evaluate) -> None:
        future = self._world.evaluate(effect.model)
        timeline = self._world.timeline
        timeline.at(timeline.now_s + EVALUATION_S, self._evaluated, effect.version, future, self._process)

    def _evaluated(self, version: int, future: Future[Evaluation], process: int) -> None:
        if process != self._process:
            return
        try:
            event: e.Event = e.Evaluated(self.now, version, future.result())
        except ExecutorError:
            raise
        except EdgeError as error:
            event = e.WorkFailed(self.now, str(error))
        self._step(event)

    def _finished(self, effect: e.Finished) -> None:
        self.state = None
        self._world.ended(effect.status, effect.reason)


_EFFECTS: dict[type, Callable[[VirtualServer, Any], None]] = {
    e.Save: VirtualServer._save,  # noqa: SLF001
    e.SendJob: VirtualServer._send_job,  # noqa: SLF001
    e.SendStanding: VirtualServer._send_standing,  # noqa: SLF001
    e.SendCancel: VirtualServer._send_cancel,  # noqa: SLF001
    e.Fetch: VirtualServer._fetch,  # noqa: SLF001
    e.SendDone: VirtualServer._send_done,  # noqa: SLF001
    e.SendVerdict: VirtualServer._send_verdict,  # noqa: SLF001
    e.AnswerFromStore: VirtualServer._answer_from_store,  # noqa: SLF001
    e.Aggregate: VirtualServer._aggregate,  # noqa: SLF001
    e.Evaluate: VirtualServer._evaluate,  # noqa: SLF001
    e.Finished: VirtualServer._finished,  # noqa: SLF001
}
