"""The agent of a virtual device: the device's own state machine, and what carries out its effects in virtual time."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.simulation.settings import CHUNK_BYTES
from coordinator.simulation.standing import VirtualStanding
from coordinator.simulation.tasks import Refused, content
from coordinator.simulation.transfers import Transfers
from coordinator.simulation.worker import VirtualWorker
from edge_runtime.agent import events, jobs
from edge_runtime.agent.limits import Decline, decline
from edge_runtime.messages import (
    BlobRef,
    Cancel,
    Done,
    Job,
    Need,
    Standing,
    UpdateId,
    UpdateMeta,
    Verdict,
)
from edge_runtime.store.spool import RunChange, SpooledUpdate

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.simulation.device import VirtualDevice
    from coordinator.simulation.tasks import TrainedUpdate
    from edge_runtime.messages import FromCoordinator
    from edge_runtime.store.spool import State

TICK_S = 5.0  # as the daemon: between looks at the owner's limits
CLOSED_KEPT = 16  # verdicts remembered, so that a repeated job is not trained again


class VirtualAgent:
    """One agent; what it has on its disk outlives :meth:`stop`."""

    __slots__ = (
        "_closed",
        "_crashes",
        "_data",
        "_device",
        "_held",
        "_looks",
        "_number",
        "_run_state",
        "_since_s",
        "_spool",
        "_standing",
        "_stepping",
        "_steps",
        "_transfers",
        "_watches",
        "_worker",
        "_world",
        "state",
    )

    def __init__(self, device: VirtualDevice) -> None:
        self._device, self._world = device, device.world
        self._spool: dict[UpdateId, SpooledUpdate] = {}  # open, or refused and to be taken back
        self._data: dict[UpdateId, bytes | Path] = {}
        self._closed: dict[UpdateId, State] = {}
        self._run_state = b""
        self._transfers = Transfers(device, self)
        self._worker = VirtualWorker(device, self)
        self._held: int | None = None  # version of the shared model
        self._crashes: dict[str, int] = {}
        self._standing: VirtualStanding | None = None  # until there is one
        self._watches = device.conditions.watches
        self._number = 0
        self._start()

    def _start(self) -> None:
        opened = [row for row in self._spool.values() if row.state in ("ready", "delivered")]
        self.state = jobs.AgentState.restore(self._device.name, self._world.capabilities, opened)
        self._since_s: dict[tuple[str, int], float] = {}  # jobs at work, by assignment and sequence
        self._steps: deque[events.Event] = deque()
        self._stepping = self._looks = False
        self._number += 1

    def stop(self) -> None:
        """Its process ends; jobs are forgotten, updates are not."""
        self._worker.kill()
        for key in list(self._since_s):
            self._waited(key)
        self._transfers.restart()
        self._start()
        if self._standing is not None:
            self._standing.restart(tuple(self._spool))

    # The link

    def on_up(self) -> None:
        """Connected again: transfers go on, and all updates are offered."""
        self._transfers.on_up()
        self.step(events.Connected())

    def on_down(self) -> None:
        """The connection is gone."""
        self._transfers.on_down()

    def came(self, name: str, size_bytes: float) -> None:
        """A blob is here, after its last bytes."""
        waiting = (entry.job for entry in self.state.jobs.values() if name in entry.missing)
        job = next(waiting, None)
        self.moved(None if job is None else (job.assignment, job.sequence), size_bytes, up=False)
        self.step(events.BlobReady(self._world.timeline.now_s, name))

    def gone(self, update: UpdateId, size_bytes: float, *, offers: bool) -> None:
        """All bytes of an update are sent; with ``offers`` its offer goes with them."""
        row = self._spool.get(update)
        if row is None:
            return
        self.moved((update.assignment, update.sequence), size_bytes, up=True)
        content = (update, row.blob, row.meta, self._data[update])
        self._world.to_server(self._device, "offer" if offers else "bytes", content, latency_s=0.0)

    def moved(self, key: tuple[str, int] | None, size_bytes: float, *, up: bool) -> None:
        """Bytes went over the link, for a job or for none that is known."""
        self._device.conditions.moved(size_bytes)
        joules = self._device.radio_j(size_bytes, up=up)
        self._world.recorder.spend(self._device.number, key, "radio", joules)
        self._world.server.moved(size_bytes, up=up)

    def receive(self, message: FromCoordinator) -> None:  # noqa: C901 - one arm per message
        """A message of the coordinator."""
        now = self._world.timeline.now_s
        match message:
            case Job():
                self._job_arrived(now, message)
            case Done(update=update):
                self.step(events.DoneArrived(update))
            case Verdict(update=update, counted=counted, reason=reason):
                if self._standing is not None:
                    self._standing.told(message)
                self.step(events.VerdictArrived(now, update, counted, reason))
            case Cancel(run=run, assignment=assignment):
                if self._standing is not None:
                    self._standing.told(message)
                self.step(events.JobCancelled(run, assignment))
            case Standing():
                if self._standing is None:
                    self._standing = VirtualStanding(self._device, self)
                self._standing.told(message)
                self._standing.look()
            case Need(sha256=name):
                for update, row in self._spool.items():
                    if row.blob.sha256 == name and row.state in ("ready", "delivered"):
                        self._transfers.send(update, row.blob.size_bytes)

    def _job_arrived(self, now: float, job: Job) -> None:
        update = UpdateId(job.run, self._device.name, job.assignment, job.sequence)
        row = self._spool.get(update)
        known = row.state if row is not None else self._closed.get(update)
        held = job.model.base is None or job.model.base in (0, self._held)
        self._since_s.setdefault((job.assignment, job.sequence), now)
        crashes = self._crashes.get(job.bundle.sha256, 0)
        if self._standing is not None:
            self._standing.told(job)
        fetch_bytes = self._transfers.missing_bytes(job.bundle, *job.model.blobs)
        declined = decline(job, self._device.conditions.known(fetch_bytes), self._device.owner_limits)
        self.step(events.JobArrived(now, job, known, crashes, held, declined))
        if (job.run, job.assignment) in self.state.jobs:
            self._world.timeline.at(now + job.deadline_s, self.tick, self._device.session)
        elif known is None and (job.assignment, job.sequence) not in self._at_work():
            self._waited((job.assignment, job.sequence))

    def _at_work(self) -> set[tuple[str, int]]:
        return {(entry.job.assignment, entry.job.sequence) for entry in self.state.jobs.values()}

    def tick(self, session: int) -> None:
        """Time passed: a deadline may be over."""
        if session == self._device.session:
            self.step(events.Tick(self._world.timeline.now_s))

    # Effects

    def step(self, event: events.Event) -> None:
        if self._stepping:
            self._steps.append(event)
            return
        if self._watches:
            self._check_limits()
        self._steps.append(event)
        self._stepping = True
        while self._steps:
            for effect in jobs.step(self.state, self._steps.popleft()):
                _EFFECTS[type(effect)](self, effect)
        self._stepping = False
        if self._standing is not None:
            self._standing.look()
        if self._watches and self.state.jobs and not self._looks:
            self._look(self._number)

    def _check_limits(self) -> None:
        """As the daemon: training pauses while a limit of the owner forbids it."""
        found = self._device.conditions.held()
        if (found is not None) != bool(self.state.paused):
            now, none = self._world.timeline.now_s, Decline("", 0.0)
            found = found or none
            self._steps.append(events.Paused(now, found.reason, found.keeps_work, found.for_s))

    def _look(self, number: int) -> None:
        """Time passes: every few seconds while there is a job."""
        if number != self._number:
            return
        self._looks = bool(self.state.jobs)
        if self._looks:
            now = self._world.timeline.now_s
            self._world.timeline.at(now + TICK_S, self._look, number)
            self.step(events.Tick(now))

    def _fetch(self, effect: events.FetchBlob) -> None:
        if self._transfers.has(effect.blob.sha256):
            self._steps.append(events.BlobReady(self._world.timeline.now_s, effect.blob.sha256))
        else:
            self._transfers.fetch(effect.blob)

    def _stop_fetch(self, effect: events.StopFetch) -> None:
        self._transfers.stop_fetch(effect.sha256)

    def _start_training(self, effect: events.StartTraining) -> None:
        job, base = effect.job, effect.job.model.base
        if base is not None and base not in (0, self._held):
            self._steps.append(events.ModelLost(self._world.timeline.now_s))
            return
        refused = tuple(
            Refused(update, content(self._data[update]), row.key)
            for update, row in self._spool.items()
            if row.state == "refused" and update.run == job.run
        )
        self._worker.start(job, self._run_state, refused)
        self._steps.append(events.PhaseBegun("train"))

    def trained(self, job: Job, result: TrainedUpdate, meta: UpdateMeta) -> None:
        """The worker is done; what it made is on disk."""
        if job.model.vector_sha256 is not None:
            self._held = job.model_version
        blob = BlobRef(sha256=result.sha256, size_bytes=result.size_bytes, chunk_bytes=CHUNK_BYTES)
        self._data[jobs.update_of(job, self._device.name)] = result.data
        change = RunChange("state", result.returned) if result.size_bytes else None
        if change is not None:
            self._run_state = result.state
        now = self._world.timeline.now_s
        self.step(events.PhaseBegun("compress"))
        self.step(events.Trained(now, blob.sha256, blob, meta, result.key, change))
        self._device.announce_samples()

    def _stop_early(self, effect: events.StopEarly) -> None:
        self._worker.stop_early(effect.reason)

    def _stop_training(self, effect: events.StopTraining) -> None:
        energy = self._worker.kill()
        if energy is not None:
            self._steps.append(events.WorkerCrashed(self._world.timeline.now_s, effect.reason, True, energy))

    def _spool_update(self, effect: events.SpoolUpdate) -> None:
        self._spool[effect.update.update] = effect.update
        if self._standing is not None:
            self._standing.done(effect)
        for returned in effect.change.returned if effect.change is not None else ():
            self._forget(returned, "refused")

    def _offer(self, effect: events.Offer) -> None:
        row = self._spool.get(effect.update)
        if row is None or not self._device.connected:
            return
        if effect.push:
            self._transfers.send(effect.update, row.blob.size_bytes, offers=True)
        else:
            self._world.to_server(self._device, "offer", (effect.update, row.blob, row.meta, None))

    def _close(self, effect: events.CloseUpdate) -> None:
        update = effect.update
        self._waited((update.assignment, update.sequence))
        row = self._spool.get(update)
        if row is None:
            return
        row.state, row.reason = effect.state, effect.reason
        if effect.state == "counted" or (effect.state == "refused" and not row.key):
            self._forget(update, effect.state)
        elif effect.state == "refused":
            self._closed[update] = "refused"

    def _forget(self, update: UpdateId, state: State) -> None:
        self._spool.pop(update, None)
        data = self._data.pop(update, None)
        if isinstance(data, Path):
            data.unlink(missing_ok=True)
        self._closed[update] = state
        while len(self._closed) > CLOSED_KEPT:
            del self._closed[next(iter(self._closed))]

    def _report(self, effect: events.Report) -> None:
        for key in [key for key in self._since_s if key[0] == effect.status.assignment]:
            self._waited(key)
        if self._standing is not None:
            self._standing.done(effect)
        if self._device.connected:
            self._world.to_server(self._device, "status", effect.status)

    def _count_crash(self, effect: events.CountCrash) -> None:
        self._crashes[effect.bundle] = self._crashes.get(effect.bundle, 0) + 1

    def _forgive(self, effect: events.ForgiveCrashes) -> None:
        self._crashes.pop(effect.bundle, None)

    # Joules

    def _waited(self, key: tuple[str, int]) -> None:
        """A job is over for this device: until now it drew its idle power for it."""
        since = self._since_s.pop(key, None)
        if since is not None:
            seconds = self._world.timeline.now_s - since
            self._world.recorder.spend(self._device.number, key, "idle", self._device.trace.idle_watts * seconds)


_EFFECTS: dict[type, Callable[[VirtualAgent, object], None]] = {
    events.FetchBlob: VirtualAgent._fetch,  # type: ignore[dict-item]  # noqa: SLF001
    events.StopFetch: VirtualAgent._stop_fetch,  # type: ignore[dict-item]  # noqa: SLF001
    events.StartTraining: VirtualAgent._start_training,  # type: ignore[dict-item]  # noqa: SLF001
    events.StopEarly: VirtualAgent._stop_early,  # type: ignore[dict-item]  # noqa: SLF001
    events.StopTraining: VirtualAgent._stop_training,  # type: ignore[dict-item]  # noqa: SLF001
    events.SpoolUpdate: VirtualAgent._spool_update,  # type: ignore[dict-item]  # noqa: SLF001
    events.Offer: VirtualAgent._offer,  # type: ignore[dict-item]  # noqa: SLF001
    events.CloseUpdate: VirtualAgent._close,  # type: ignore[dict-item]  # noqa: SLF001
    events.Report: VirtualAgent._report,  # type: ignore[dict-item]  # noqa: SLF001
    events.CountCrash: VirtualAgent._count_crash,  # type: ignore[dict-item]  # noqa: SLF001
    events.ForgiveCrashes: VirtualAgent._forgive,  # type: ignore[dict-item]  # noqa: SLF001
}
