"""The coordinator as a process: MQTT, database and files around the pure round machine.

One thread runs the event loop; aggregation and evaluation run in one other thread, so that devices are answered
meanwhile. Command line and server share nothing but the database: a submitted run waits there until a server takes it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import edge_runtime
from coordinator import events as e
from coordinator.background import DISK_RETRY_S, Background
from coordinator.errors import StoreError
from coordinator.fleet import Fleet
from coordinator.job_message import make_job
from coordinator.report import run_summary
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from coordinator.runner import RunFiles
from coordinator.settings import Connection, ServerSettings
from coordinator.store import Store, StoredRun
from coordinator.submission import submit
from coordinator.transfers import Downlink, Uplink, with_chunk_size
from edge_runtime import messages, topics
from edge_runtime.errors import EdgeError, MessageError, StorageError
from edge_runtime.files import write_durably
from edge_runtime.transport.link import Link
from edge_runtime.transport.loop import Loop, Timer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.aggregation import Made
    from coordinator.plan import Plan
    from edge_runtime.messages import BlobRef, Evaluation, UpdateId, UpdateMeta

_T = TypeVar("_T")

log = logging.getLogger("edge.coordinator")

POLL_S = 0.25  # how soon a submission or a stop request of another process is noticed
TICK_S = 1.0
DEVICE_SAVE_S = 1.0
LARGEST_NUMBER = 1 << 53  # of samples or a sequence: what a float64 weight and every database still hold exactly
LARGEST_LOSS = 1e100


class Coordinator:
    """Runs federated training for every submitted plan.

    Example:
        >>> from coordinator import Coordinator, ServerSettings  # doctest: +SKIP
        >>> Coordinator(ServerSettings(state_dir=Path("edge-state"))).run()  # doctest: +SKIP

    Raises:
        ConfigError: the settings cannot be used.
        TransportError: the embedded broker does not start.
        StorageError: the state folder cannot be used.
    """

    def __init__(
        self, settings: ServerSettings, *, loop: Loop | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self.loop = loop or Loop()
        self.clock = clock
        folder = settings.state_dir
        self.store = Store(folder, settings.database_url)
        self.blobs = self.store.blobs
        self.fleet = Fleet()
        self.runs: dict[str, RunState] = {}
        self.files: dict[str, RunFiles] = {}
        self._session = os.urandom(8).hex()
        self._background = Background(self.loop)
        self._offer: messages.UpdateOffer | None = None
        self._dirty_devices: set[str] = set()
        self._ticks: dict[str, Timer] = {}
        self._set_aside: set[str] = set()  # runs that could not be stored; they are taken up again from the store
        self._news = False
        self.connection = Connection(settings)
        self.link = Link(
            self.connection.link,
            self.loop,
            topics=[f"{topics.ROOT}/d/+/state", f"{topics.ROOT}/d/+/message", f"{topics.ROOT}/d/+/chunk"],
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=self._on_down,
            random=Random(self._session),
            will=(topics.COORDINATOR, lambda: self._announcement(online=False)),
        )
        self.downlink = Downlink(self.loop, self.link, self._find_blob)
        self.uplink = Uplink(self.loop, self.link, arrived=self._on_arrived, refused=self._on_refused)

    def run(self) -> None:
        """Runs until :meth:`stop`."""
        self.start()
        try:
            self.loop.run()
        finally:
            self.close()

    def start(self) -> None:
        """Takes up the open runs and connects; the loop does the rest."""
        self._poll()
        self.link.start()
        write_durably(self.settings.state_dir / "connection.json", msgspec.json.encode(self.connection.described()))
        self.loop.call_later(DEVICE_SAVE_S, self._save_devices)

    def stop(self) -> None:
        """Ends :meth:`run`; may be called from a signal handler or another thread. Runs go on at the next start."""
        self.loop.stop()

    def close(self) -> None:
        """Disconnects and frees everything."""
        self.link.stop((topics.COORDINATOR, self._announcement(online=False)))
        self.uplink.reset()
        self._background.close()
        self.store.close()
        self.connection.stop()

    def submit(self, plan: Plan) -> str:
        """Stores a run, which this server takes up, and gives its name; may be called from any thread.

        Raises:
            EdgeError: see :func:`coordinator.submission.submit`.
        """
        with closing(self._own_store()) as store:
            return submit(store, plan)

    def wait(self, run: str, timeout_s: float) -> dict[str, Any]:
        """Waits for the end of a run, at most ``timeout_s``, and gives :func:`coordinator.report.run_summary`.

        To be called from another thread than :meth:`run`. The summary's ``status`` says whether the run has ended.

        Raises:
            UnknownRunError: no such run.
        """
        end = time.monotonic() + timeout_s
        with closing(self._own_store()) as store:
            while True:
                summary = run_summary(store, run, now=self.clock())
                if summary["status"] != "running" or time.monotonic() > end:
                    return summary
                time.sleep(POLL_S)

    def _own_store(self) -> Store:
        """A store for one call from any thread; a store itself is for one thread."""
        return Store(self.settings.state_dir, self.settings.database_url, create=False)

    # Messages

    def _announcement(self, *, online: bool) -> bytes:
        state = messages.CoordinatorState(online=online, session=self._session, software=edge_runtime.__version__)
        return messages.encode(state)

    def _on_up(self) -> None:
        self.link.publish(topics.COORDINATOR, self._announcement(online=True), retain=True)

    def _on_down(self, _reason: str) -> None:
        self.downlink.reset()
        self.uplink.reset()
        for device in list(self.fleet.devices()):  # who is still there announces itself again
            self.fleet.gone(self.clock(), device.name)

    def _on_message(self, topic: str, payload: bytes) -> None:
        parsed = topics.parse_from_device(topic)
        if parsed is None:
            return
        device, leaf = parsed
        try:
            if leaf == "chunk":
                self.uplink.on_chunk(payload)
            elif payload:  # an empty retained state only clears the topic
                self._handle(device, messages.decode_from_device(payload))
        except MessageError as error:
            log.warning("%s: %s", topic, error)
        except (StorageError, StoreError) as error:  # nothing was acknowledged: the device will say it again
            log.error("%s: %s", topic, error)  # noqa: TRY400 - one line for the operator

    def _handle(self, device: str, message: messages.FromDevice) -> None:
        now = self.clock()
        self.fleet.contact(now, device)
        match message:
            case messages.DeviceState():
                if message.device != device:
                    raise MessageError(f"device {device!r} announces itself as {message.device!r}, ignored")
                self._announced(now, message)
            case messages.Telemetry():
                if not _all_finite(message):
                    raise MessageError(f"telemetry of {device!r} holds NaN or infinite values, ignored")
                self.fleet.measured(now, device, message)
                self._dirty_devices.add(device)
            case messages.JobStatus(run=run, assignment=assignment, status=status, reason=reason):
                self.downlink.unexpect(device) if status in ("failed", "rejected") else None
                if status in ("failed", "rejected"):
                    log.warning("%s: job %s/%s %s: %s", device, run, assignment, status, reason)
                    self._step(run, e.JobReported(now, device, assignment, reason))
            case messages.UpdateOffer():
                self._offered(now, device, message)
            case messages.Need():
                self.downlink.on_need(device, message)
            case messages.Gone():
                return  # the device will offer what it still has

    def _announced(self, now: float, state: messages.DeviceState) -> None:
        before = self.fleet.get(state.device)
        conflict = "" if before is None else before.conflict
        joined = self.fleet.announce(now, state)
        self._dirty_devices.add(state.device)
        if not state.online:
            self.downlink.unexpect(state.device)
        known = self.fleet.get(state.device)
        if joined:
            log.info("device %s joined", state.device)
            if known is not None and known.conflict and not conflict:
                log.error("%s", known.conflict)
            for run in list(self.runs):
                self._step(run, e.DeviceJoined(now, state.device))

    def _offered(self, now: float, device: str, offer: messages.UpdateOffer) -> None:
        update = offer.update
        if update.device != device:
            raise MessageError(f"device {device!r} offers an update of {update.device!r}, ignored")
        if update.sequence > LARGEST_NUMBER:
            raise MessageError(f"device {device!r} offers an update with sequence {update.sequence}, ignored")
        if update.run in self._set_aside:
            return  # its job, repeated when the run goes on, makes the device offer again
        if update.run not in self.runs:
            self._carry_out(update.run, e.AnswerFromStore(update))
            return
        reason = implausible(offer.meta)
        if reason:
            meta = messages.UpdateMeta(round=0, model_version=offer.meta.model_version, samples=0, steps=0)
            self._step(update.run, e.UpdateDamaged(now, update, offer.blob, meta, reason))
            return
        self._offer = offer
        self._step(update.run, e.UpdateOffered(now, update, offer.blob, offer.meta))
        self._offer = None

    def _send(self, device: str, message: messages.FromCoordinator) -> None:
        self.link.publish(topics.to_device(device, "message"), messages.encode(message))

    # Runs

    def _poll(self) -> None:
        """Takes up new runs and stop requests of other processes."""
        try:
            self._news = self.store.changed() or self._news
            for stored in self.store.active() if self._news else []:
                name = stored.row.run
                if name not in self.runs and name not in self._set_aside:
                    self._take_up(stored)
                if stored.stop_reason is not None:
                    self._step(name, e.StopRequested(self.clock(), stored.stop_reason))
            self._news = False
        except (StorageError, StoreError) as error:
            log.error("%s; looking again in %g s", error, DISK_RETRY_S)  # noqa: TRY400 - one line for the operator
            self.loop.call_later(DISK_RETRY_S, self._poll)
            return
        self.loop.call_later(POLL_S, self._poll)

    def _take_up(self, stored: StoredRun) -> None:
        run, plan = stored.row.run, stored.plan
        try:
            state = RunState.from_rows(plan, self.store.load_run(run))
            self.files[run] = RunFiles(self.store, plan, state.run)
        except EdgeError as error:
            log.error("run %s cannot be taken up: %s", run, error)  # noqa: TRY400 - one line for the operator
            ended = msgspec.structs.replace(stored.row, status="failed", phase="done", reason=str(error))
            self.store.save([ended])
            return
        self.runs[run] = state
        log.info("run %s: round %d of %d, %s", run, state.run.round + 1, plan.rounds, state.run.phase)
        for effect in resume(state):
            self._carry_out(run, effect)
        self._step(run, e.Tick(self.clock()))
        self._tick(run)

    def _tick(self, run: str) -> None:
        if run in self.runs:
            self._step(run, e.Tick(self.clock()))
            self._ticks[run] = self.loop.call_later(TICK_S, lambda: self._tick(run))

    def _step(self, run: str, event: e.Event) -> None:
        state = self.runs.get(run)
        if state is None:
            return
        try:
            for effect in step(state, event, self.fleet):
                self._carry_out(run, effect)
                if run in self._set_aside:  # by a step inside this one
                    return
        except (StorageError, StoreError) as error:
            self._put_aside(run, str(error))

    def _put_aside(self, run: str, reason: str) -> None:
        """What happened cannot be stored, so it did not happen: forget it, and go on from the store when that works."""
        log.error("run %s: %s; trying again in %g s", run, reason, DISK_RETRY_S)
        self._set_aside.add(run)
        self.fleet.forget(self.runs.pop(run).need)
        timer = self._ticks.pop(run, None)
        if timer is not None:
            timer.cancel()
        self.loop.call_later(DISK_RETRY_S, lambda: self._take_up_again(run))

    def _take_up_again(self, run: str) -> None:
        try:
            stored = self.store.run(run)
        except EdgeError as error:
            log.error("run %s: %s; trying again in %g s", run, error, DISK_RETRY_S)  # noqa: TRY400 - one line
            self.loop.call_later(DISK_RETRY_S, lambda: self._take_up_again(run))
            return
        self._set_aside.discard(run)
        self._take_up(stored)
        if stored.stop_reason is not None:
            self._step(run, e.StopRequested(self.clock(), stored.stop_reason))

    def _carry_out(self, run: str, effect: e.Effect) -> None:  # noqa: C901 - one arm per effect
        match effect:
            case e.Save(rows):
                self.store.save(rows)
                for row in rows:
                    if isinstance(row, e.UpdateRow) and row.verdict == "refused":
                        log.warning("update %s refused: %s", row.update, row.reason)
            case e.SendJob(assignment):
                self._send_job(run, assignment)
            case e.SendCancel(device, assignment, reason):
                self._send(device, messages.Cancel(run=run, assignment=assignment, reason=reason))
            case e.Fetch(update, blob, meta):
                offer = self._offer or messages.UpdateOffer(update=update, blob=blob, meta=meta)
                self._fetch(run, offer)
            case e.SendDone(update):
                self._send(update.device, messages.Done(update=update))
            case e.SendVerdict(update, counted, reason):
                self._send(update.device, messages.Verdict(update=update, counted=counted, reason=reason))
            case e.AnswerFromStore(update):
                self._answer_from_store(update)
            case e.Aggregate():
                self._aggregate(run, effect)
            case e.Evaluate(version, model):
                self._evaluate(run, version, model)
            case e.Finished(status, reason):
                self._finished(run, status, reason)

    def _send_job(self, run: str, assignment: e.AssignmentRow) -> None:
        device = self.fleet.get(assignment.device)
        if device is None or not device.online or not self.link.is_up:
            return  # DeviceJoined repeats it
        state = self.runs[run]
        job = make_job(state.plan, state.run, assignment, self.clock(), self.link.chunk_bytes)
        self.files[run].sends(job.model)
        self.downlink.expect(assignment.device, job.bundle, job.model)
        self._send(assignment.device, job)

    def _fetch(self, run: str, offer: messages.UpdateOffer) -> None:
        files = self.files[run]
        reason = files.unfit(offer.blob)
        if reason:
            self._step(run, e.UpdateDamaged(self.clock(), offer.update, offer.blob, offer.meta, reason))
            return
        self.uplink.fetch(self.blobs, offer)

    def _on_arrived(self, update: UpdateId, blob: BlobRef, meta: UpdateMeta) -> None:
        files = self.files.get(update.run)
        if files is None:
            return
        reason = files.damage(blob)
        if reason:
            self._step(update.run, e.UpdateDamaged(self.clock(), update, blob, meta, reason))
        else:
            self._step(update.run, e.UpdateArrived(self.clock(), update, blob, meta))

    def _on_refused(self, update: UpdateId, blob: BlobRef, meta: UpdateMeta, reason: str) -> None:
        self._step(update.run, e.UpdateDamaged(self.clock(), update, blob, meta, reason))

    def _answer_from_store(self, update: UpdateId) -> None:
        row = self.store.stored_verdict(update)
        if row is None:
            reason = "the coordinator knows no such run or assignment"
            log.warning("update %s refused: %s", update, reason)
            self._send(update.device, messages.Verdict(update=update, counted=False, reason=reason))
        elif row.verdict == "pending":
            self._send(update.device, messages.Done(update=update))
        else:
            counted = row.verdict == "counted"
            self._send(update.device, messages.Verdict(update=update, counted=counted, reason=row.reason))

    def _aggregate(self, run: str, effect: e.Aggregate) -> None:
        files = self.files[run]

        def done(made: Made) -> None:
            event = e.Aggregated(
                self.clock(),
                effect.round,
                made.model,
                down=made.down,
                method_state=made.method_state,
                bytes_up=self.uplink.take_received_bytes(run),
                bytes_down=self.downlink.take_sent_bytes(files.sent_blobs),
            )
            self._step(run, event)
            self._clean(run)

        self._in_background(run, lambda: files.aggregate(effect), done)

    def _evaluate(self, run: str, version: int, model: BlobRef) -> None:
        files = self.files[run]

        def done(result: Evaluation) -> None:
            self._step(run, e.Evaluated(self.clock(), version, result))

        self._in_background(run, lambda: files.evaluate(model), done)

    def _in_background(self, run: str, action: Callable[[], _T], done: Callable[[_T], None]) -> None:
        state = self.runs.get(run)
        self._background.run(
            action,
            done=done,
            failed=lambda reason: self._step(run, e.WorkFailed(self.clock(), reason)),
            wanted=lambda: self.runs.get(run) is state,  # else the run ended, or was taken up again with this work
        )

    def _clean(self, run: str) -> None:
        if run in self.files:
            self.files[run].clean(self.runs[run])

    def _finished(self, run: str, status: str, reason: str) -> None:
        log.info("run %s %s%s", run, status, f": {reason}" if reason else "")
        self.uplink.stop_run(run)
        files = self.files.pop(run, None)
        if files is not None:
            for sha256 in files.sent_blobs:
                self.downlink.forget(sha256)
        state = self.runs.pop(run, None)
        if state is not None:
            self.fleet.forget(state.need)
        timer = self._ticks.pop(run, None)
        if timer is not None:
            timer.cancel()

    # Blobs and devices

    def _find_blob(self, sha256: str) -> tuple[Path, BlobRef] | None:
        for files in self.files.values():
            blob = files.sent_blobs.get(sha256)
            if blob is not None:
                return self.blobs.path(sha256), with_chunk_size(blob, self.link.chunk_bytes)
        return None

    def _save_devices(self) -> None:
        if self._dirty_devices:
            devices = [self.fleet.get(name) for name in sorted(self._dirty_devices)]
            try:
                self.store.save([device.row() for device in devices if device is not None])
            except StoreError as error:
                log.error("%s; trying again in %g s", error, DISK_RETRY_S)  # noqa: TRY400 - one line for the operator
                self.loop.call_later(DISK_RETRY_S, self._save_devices)
                return
            self._dirty_devices.clear()
        self.loop.call_later(DEVICE_SAVE_S, self._save_devices)


def _all_finite(message: messages.Telemetry) -> bool:
    values = msgspec.structs.astuple(message)
    return all(math.isfinite(value) for value in values if isinstance(value, float))


def implausible(meta: UpdateMeta) -> str:
    """Why what a device says about its update cannot be true; empty if it can."""
    if meta.samples > LARGEST_NUMBER:
        return f"claims {meta.samples} samples"
    evaluation = meta.evaluation
    losses = [meta.loss, meta.train_s] + ([] if evaluation is None else [evaluation.loss_sum])
    wrong = [value for value in losses if value is not None and not abs(value) <= LARGEST_LOSS]
    if wrong:
        return f"reports a loss or time of {wrong[0]}"
    if evaluation is not None and max(evaluation.samples, evaluation.correct or 0) > LARGEST_NUMBER:
        return f"claims an evaluation of {evaluation.samples} samples"
    return ""


def serve(settings: ServerSettings) -> None:
    """Runs a coordinator in the foreground until SIGTERM or SIGINT; see :class:`Coordinator` for what it raises.

    ``connection.json`` in the state folder tells local agents how to reach the broker, once it can be reached.
    """
    server = Coordinator(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
