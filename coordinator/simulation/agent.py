"""The agent of a virtual device: the device's own state machine, and what carries out its effects in virtual time."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coordinator.simulation.settings import CHUNK_BYTES
from coordinator.simulation.standing import VirtualStanding
from coordinator.simulation.tasks import Order, Refused, content
from coordinator.simulation.transfers import Transfers
from edge_runtime.agent import events, jobs
from edge_runtime.agent.limits import decline
from edge_runtime.errors import EdgeError
from edge_runtime.messages import (
    BlobRef,
    Cancel,
    Done,
    EnergyUse,
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
    from coordinator.simulation.training import Handle
    from edge_runtime.messages import FromCoordinator
    from edge_runtime.store.spool import State

CLOSED_KEPT = 16  # verdicts remembered, so that a repeated job is not trained again
EVALUATION_COST = 1 / 3  # of a training step: forward only


class _Training(NamedTuple):
    order: Order
    handle: Handle
    number: int
    began_s: float
    train_s: float
    wait_s: float  # loading and evaluating


class VirtualAgent:
    """One agent; what it has on its disk outlives :meth:`stop`."""

    __slots__ = (
        "_closed",
        "_crashes",
        "_data",
        "_device",
        "_held",
        "_number",
        "_run_state",
        "_since_s",
        "_spool",
        "_standing",
        "_stepping",
        "_steps",
        "_training",
        "_transfers",
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
        self._held: int | None = None  # version of the shared model
        self._crashes: dict[str, int] = {}
        self._number = 0
        self._standing: VirtualStanding | None = None  # until there is one
        self._start()

    def _start(self) -> None:
        opened = [row for row in self._spool.values() if row.state in ("ready", "delivered")]
        self.state = jobs.AgentState.restore(self._device.name, self._world.capabilities, opened)
        self._since_s: dict[tuple[str, int], float] = {}  # jobs at work, by assignment and sequence
        self._training: _Training | None = None
        self._steps: deque[events.Event] = deque()
        self._stepping = False

    def stop(self, reason: str) -> None:
        """Its process ends; jobs are forgotten, updates are not."""
        if self._training is not None:
            self._training_ends(reason)
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
        self._step(events.Connected())

    def on_down(self) -> None:
        """The connection is gone."""
        self._transfers.on_down()

    def came(self, name: str, size_bytes: float) -> None:
        """A blob is here, after its last bytes."""
        waiting = (entry.job for entry in self.state.jobs.values() if name in entry.missing)
        job = next(waiting, None)
        self.moved(None if job is None else (job.assignment, job.sequence), size_bytes, up=False)
        self._step(events.BlobReady(self._world.timeline.now_s, name))

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
                self._step(events.DoneArrived(update))
            case Verdict(update=update, counted=counted, reason=reason):
                if self._standing is not None and not counted:
                    self._standing.refused(update, reason)
                self._step(events.VerdictArrived(now, update, counted, reason))
            case Cancel(run=run, assignment=assignment):
                if self._standing is not None:
                    self._standing.cancelled(run, assignment)
                self._step(events.JobCancelled(run, assignment))
            case Standing():
                if self._standing is None:
                    self._standing = VirtualStanding(self._device, self)
                self._standing.arrived(message)
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
            self._standing.job_came(job.run, job.assignment, job.sequence)
        fetch_bytes = self._transfers.missing_bytes(job.bundle, *job.model.blobs)
        declined = decline(job, self._device.known(fetch_bytes), self._device.owner_limits)
        self._step(events.JobArrived(now, job, known, crashes, held, declined))
        if (job.run, job.assignment) in self.state.jobs:
            self._world.timeline.at(now + job.deadline_s, self.tick, self._device.session)
        elif known is None and (job.assignment, job.sequence) not in self._at_work():
            self._waited((job.assignment, job.sequence))

    def _at_work(self) -> set[tuple[str, int]]:
        return {(entry.job.assignment, entry.job.sequence) for entry in self.state.jobs.values()}

    def tick(self, session: int) -> None:
        """Time passed: a deadline may be over."""
        if session == self._device.session:
            self._step(events.Tick(self._world.timeline.now_s))

    # Effects

    def _step(self, event: events.Event) -> None:
        self._steps.append(event)
        if self._stepping:
            return
        self._stepping = True
        while self._steps:
            for effect in jobs.step(self.state, self._steps.popleft()):
                _EFFECTS[type(effect)](self, effect)
        self._stepping = False
        if self._standing is not None:
            self._standing.look()

    def _fetch(self, effect: events.FetchBlob) -> None:
        if self._transfers.has(effect.blob.sha256):
            self._steps.append(events.BlobReady(self._world.timeline.now_s, effect.blob.sha256))
        else:
            self._transfers.fetch(effect.blob)

    def _stop_fetch(self, effect: events.StopFetch) -> None:
        self._transfers.stop_fetch(effect.sha256)

    def _start_training(self, effect: events.StartTraining) -> None:
        job, world, device = effect.job, self._world, self._device
        now = world.timeline.now_s
        base = job.model.base
        if base is not None and base not in (0, self._held):
            self._steps.append(events.ModelLost(now))
            return
        samples = world.samples(device.number)
        steps = planned_steps(job, samples)
        order = Order(
            device=device.name,
            number=device.number,
            job=job,
            model=world.server.whole_model(job),
            samples=samples,
            steps=steps,
            state=self._run_state,
            refused=tuple(
                Refused(update, content(self._data[update]), row.key)
                for update, row in self._spool.items()
                if row.state == "refused" and update.run == job.run
            ),
        )
        watts = device.trace.training_watts + device.trace.idle_watts
        if job.joule_limit is not None and watts * steps * device.step_s > job.joule_limit:
            most = max(1, math.ceil(job.joule_limit / (watts * device.step_s)))
            order = order._replace(stop_after=most, stopped=f"it drew {job.joule_limit:g} J, all that it may")
            steps = min(steps, most)
        self._begin(order, now, steps)
        self._steps.append(events.PhaseBegun("train"))
        fault = world.faults.of_job()
        if fault is not None and self._training is not None:
            ends = now + fault.share * (self._training.train_s + self._training.wait_s)
            world.timeline.at(ends, self._strike, fault.kind, self._training.number)

    def _begin(self, order: Order, began_s: float, steps: int) -> None:
        self._number += 1
        train_s = steps * self._device.step_s
        wait_s = evaluation_steps(order.job, order.samples) * EVALUATION_COST * self._device.step_s
        handle = self._world.trainer.start(order)
        self._training = _Training(order, handle, self._number, began_s, train_s, wait_s)
        self._device.train(training=True)
        self._world.timeline.at(began_s + wait_s + train_s, self._trained, self._number)

    def _strike(self, kind: str, number: int) -> None:
        """A fault hits this training, if it is still going on."""
        if self._training is None or self._training.number != number:
            return
        self._world.faults.note(kind)
        if kind == "agents":
            self._device.restart("its agent crashed")
            return
        energy = self._training_ends("the worker crashed")
        self._step(events.WorkerCrashed(self._world.timeline.now_s, "the worker crashed (a fault)", False, energy))

    def _trained(self, number: int) -> None:
        training = self._training
        if training is None or training.number != number:
            return
        now, job = self._world.timeline.now_s, training.order.job
        try:
            result = training.handle.result()
        except EdgeError as error:
            energy = self._training_ends(str(error))
            self._step(events.TrainingFailed(now, str(error), energy))
            return
        energy = self._training_ends("")
        if energy is not None:
            radio_j = self._device.trace.radio_joules_per_mb_up * result.size_bytes / 1e6
            energy = msgspec.structs.replace(energy, radio_mj=round(1000 * radio_j))
        meta = msgspec.structs.replace(
            result.meta, train_ms=round(1000 * training.train_s), encode_cpu_ms=0, energy=energy
        )
        self._world.recorder.trained += 1
        self._device.trained_samples = training.order.samples
        if job.model.vector_sha256 is not None:
            self._held = job.model_version
        self._step(events.PhaseBegun("compress"))
        self._finish(now, result, meta, job)
        self._device.announce_samples()

    def _finish(self, now: float, result: TrainedUpdate, meta: UpdateMeta, job: Job) -> None:
        blob = BlobRef(sha256=result.sha256, size_bytes=result.size_bytes, chunk_bytes=CHUNK_BYTES)
        update = UpdateId(job.run, self._device.name, job.assignment, job.sequence)
        self._data[update] = result.data
        change = RunChange("state", result.returned) if result.size_bytes else None
        if change is not None:
            self._run_state = result.state
        self._step(events.Trained(now, blob.sha256, blob, meta, result.key, change))

    def _training_ends(self, reason: str) -> EnergyUse | None:
        """What the training that ends now has drawn, by the device model; with a reason it is broken off."""
        training, self._training = self._training, None
        assert training is not None
        if reason:
            training.handle.cancel()
        now, trace = self._world.timeline.now_s, self._device.trace
        seconds = now - training.began_s
        self._device.train(training=False)
        job = training.order.job
        key = None if reason else (job.assignment, job.sequence)  # it may be done again, and count: this was in vain
        self._world.recorder.spend(self._device.number, key, "training", trace.training_watts * seconds)
        watts = trace.training_watts + trace.idle_watts
        train_s = max(0.0, seconds - training.wait_s)
        return EnergyUse(
            train_mj=round(1000 * watts * train_s),
            other_mj=round(1000 * watts * (seconds - train_s)),
            idle_mw=round(1000 * trace.idle_watts),
            sensor="model",
            modelled=True,
        )

    def _stop_early(self, effect: events.StopEarly) -> None:
        """Training ends after the step that runs."""
        training = self._training
        if training is None:
            return
        passed = self._world.timeline.now_s - training.began_s - training.wait_s
        steps = max(1, math.floor(passed / self._device.step_s) + 1)
        if steps >= training.order.steps:
            return
        training.handle.cancel()
        self._begin(training.order._replace(stop_after=steps, stopped=effect.reason), training.began_s, steps)

    def _stop_training(self, effect: events.StopTraining) -> None:
        if self._training is not None:
            energy = self._training_ends(effect.reason)
            self._steps.append(events.WorkerCrashed(self._world.timeline.now_s, effect.reason, True, energy))

    def _spool_update(self, effect: events.SpoolUpdate) -> None:
        self._spool[effect.update.update] = effect.update
        if self._standing is not None:
            self._standing.job_ended(effect.update.update.run, effect.update.update.assignment, trained=True)
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
            self._standing.job_ended(effect.status.run, effect.status.assignment, trained=False)
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


def planned_steps(job: Job, samples: int) -> int:
    """Steps of a job on so many samples; one pass for an anchor, 0 where it only evaluates."""
    left = samples if job.max_samples is None else min(samples, job.max_samples)
    left = max(1, round(left * (1.0 - job.holdout_fraction)))
    used = left - left % job.batch_size if job.last_batch == "drop" and job.role == "trainer" else left
    passes = -(-max(used, 1) // job.batch_size)
    if job.role == "anchor":
        return passes
    return job.steps if job.steps is not None else (job.epochs or 0) * passes


def evaluation_steps(job: Job, samples: int) -> int:
    """Batches of the hold-out that a job evaluates first, or of all samples where it does nothing else."""
    trains = job.epochs is not None or job.steps is not None or job.role == "anchor"
    if trains and not (job.evaluate and job.holdout_fraction > 0):
        return 0
    share = job.holdout_fraction if job.holdout_fraction > 0 else 1.0
    return -(-max(1, round(samples * share)) // job.batch_size)
