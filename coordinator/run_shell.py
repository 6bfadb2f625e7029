"""Carries out what the round machine decides: the store, files, transfers and messages of all runs of one server."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import msgspec

from coordinator import events as e
from coordinator.background import DISK_RETRY_S, Background
from coordinator.checking import Checks
from coordinator.errors import StoreError
from coordinator.evaluation_numbers import accuracy
from coordinator.job_message import inline_bytes, make_job, make_standing
from coordinator.ledger import LedgerRow
from coordinator.plausibility import LARGEST_NUMBER, believed, implausible
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from coordinator.runner import RunFiles
from coordinator.traffic import Traffic
from coordinator.transfers import Downlink, Uplink, named, with_chunk_size
from coordinator.wording import counted, percent, size
from edge_runtime import messages, topics
from edge_runtime.errors import EdgeError, MessageError, StorageError, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.aggregation.making import Made
    from coordinator.executors.base import Executor
    from coordinator.fleet import Fleet
    from coordinator.store import Store, StoredRun
    from edge_runtime.messages import BlobRef, Evaluation, UpdateId, UpdateMeta
    from edge_runtime.transport.link import Link
    from edge_runtime.transport.loop import Loop, Timer

_T = TypeVar("_T")

log = logging.getLogger("edge.coordinator")

POLL_S = 0.25  # how soon a submission or a stop request of another process is noticed
TICK_S = 1.0
LONGEST_REASON = 1000  # characters of why a device did not do a job: a worker's line is no longer


class RunShell:
    """All open runs of a server. Every method is called in the loop's thread."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        loop: Loop,
        link: Link,
        clock: Callable[[], float],
        *,
        executor: Executor | None = None,
    ) -> None:
        self._executor = executor
        self.store, self.fleet, self.loop, self.link, self.clock = store, fleet, loop, link, clock
        self.runs: dict[str, RunState] = {}
        self.files: dict[str, RunFiles] = {}
        self.traffic = Traffic()
        self.downlink = Downlink(loop, link, self._find_blob, self._on_chunk_sent)
        self.uplink = Uplink(loop, link, arrived=self._on_arrived, refused=self._on_refused, traffic=self.traffic)
        self._background = Background(loop)
        self._checks = Checks(loop, executor)
        self._doubted: set[tuple[str, str]] = set()  # run and device, of which the log has said it
        self._offer: messages.UpdateOffer | None = None
        self._ticks: dict[str, Timer] = {}
        self._set_aside: set[str] = set()  # runs that could not be stored; they are taken up again from the store
        self._news = False

    def start(self) -> None:
        """Takes up the open runs, and those that come."""
        self._poll()

    def close(self) -> None:
        """Ends receiving and the work in progress; the runs go on at the next start."""
        self.uplink.reset()
        self._checks.close()
        self._background.close()

    def on_down(self) -> None:
        """The link is down: who still needs anything will say so when it is up again."""
        self.downlink.reset()
        self.uplink.reset()

    def on_joined(self, now: float, device: str) -> None:
        """A device announced itself: every run tells it again what it may have missed."""
        for run in list(self.runs):
            self._step(run, e.DeviceJoined(now, device))

    def on_left(self, now: float, device: str) -> None:
        """A device went offline: others may be asked in its place."""
        self.downlink.unexpect(device)
        for run in list(self.runs):
            self._step(run, e.DeviceLeft(now, device))

    def heard(self, device: str, message: messages.FromDevice, payload_bytes: int) -> None:
        """Counts a message of a device for the run that it is about."""
        match message:
            case messages.UpdateOffer(update=update):
                run: str | None = update.run
            case messages.JobStatus(run=run) | messages.Pull(run=run):
                pass
            case messages.Need(sha256=sha256):
                run = self._run_that_sent(device, sha256)
            case _:
                return
        if run is not None and run in self.runs:
            self.traffic.up(run, topics.from_device(device, "message"), payload_bytes)

    def on_job_failed(self, now: float, device: str, status: messages.JobStatus) -> None:
        """A device rejected a job, declined it because of its owner's limits, or failed at it."""
        self.downlink.unexpect(device)
        reason = status.reason[:LONGEST_REASON]
        rejected = status.status == "rejected"
        declined_s = status.declined_s if rejected else None
        if declined_s is None:
            log.warning("%s: job %s/%s %s: %s", device, status.run, status.assignment, status.status, reason)
        else:
            log.info("%s declined job %s/%s: %s", device, status.run, status.assignment, reason)
        event = e.JobReported(now, device, status.assignment, reason, rejected, status.energy, declined_s)
        self._step(status.run, event)

    def on_pull(self, now: float, device: str, pull: messages.Pull) -> None:
        """A device wants to train its standing assignment now.

        Raises:
            MessageError: the message cannot be meant.
        """
        if pull.sequence > LARGEST_NUMBER:
            raise MessageError(f"device {device!r} wants update {pull.sequence} of a standing assignment, ignored")
        if pull.run in self.runs:
            self._step(pull.run, e.Pulled(now, device, pull.assignment, pull.sequence, pull.steps))
        elif pull.run not in self._set_aside and not self.store.is_active(pull.run):
            reason = "the run has ended, or was never here"
            self._send(pull.run, device, messages.Cancel(run=pull.run, assignment=pull.assignment, reason=reason))

    def on_offer(self, now: float, device: str, offer: messages.UpdateOffer) -> None:
        """A device offers an update.

        Raises:
            MessageError: the offer cannot be meant.
        """
        update = offer.update
        if update.device != device:
            raise MessageError(f"device {device!r} offers an update of {update.device!r}, ignored")
        if update.sequence > LARGEST_NUMBER:
            raise MessageError(f"device {device!r} offers an update with sequence {update.sequence}, ignored")
        if update.run in self._set_aside:
            return  # its job, repeated when the run goes on, makes the device offer again
        if update.run not in self.runs:
            self._carry_out(update.run, e.AnswerFromStore(update, ends=True))
            return
        try:
            offer = named(offer)
        except TransferError as error:
            raise MessageError(str(error)) from error
        assert offer.blob is not None
        known = self.runs[update.run].assignments.get(update.assignment)
        if known is not None and known.device != device:
            log.warning("update %s refused: this assignment belongs to device %s", update, known.device)
        reason = implausible(offer.meta)
        if reason:
            meta = messages.UpdateMeta(round=0, model_version=offer.meta.model_version, samples=1, steps=0)
            self._step(update.run, e.UpdateDamaged(now, update, offer.blob, meta, reason))
            return
        self._offer = offer
        self._step(update.run, e.UpdateOffered(now, update, offer.blob, offer.meta))
        self._offer = None

    def _send(self, run: str, device: str, message: messages.FromCoordinator) -> None:
        topic, data = topics.to_device(device, "message"), messages.encode(message)
        if self.link.publish(topic, data) and run in self.runs:
            self.traffic.down(run, topic, len(data))

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
            files = RunFiles(self.store, plan, state.run, self._executor)
            if state.run.next_assignment and state.run.bytes_complete:  # it was taken up before
                state.run.bytes_complete = False
                self.store.save([state.run])
        except (StorageError, StoreError):
            raise  # the disk or the database, not the run: whoever asked tries again
        except EdgeError as error:
            log.error("run %s cannot be taken up: %s", run, error)  # noqa: TRY400 - one line for the operator
            ended = msgspec.structs.replace(stored.row, status="failed", phase="done", reason=str(error))
            self.store.save([ended])
            return
        self.store.save(state.bound_times(self.clock()))  # the clock may have been set back since
        self.runs[run], self.files[run] = state, files
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
        self.files.pop(run, None)
        timer = self._ticks.pop(run, None)
        if timer is not None:
            timer.cancel()
        self.loop.call_later(DISK_RETRY_S, lambda: self._take_up_again(run))

    def _take_up_again(self, run: str) -> None:
        try:
            stored = self.store.run(run)
            self._set_aside.discard(run)
            self._take_up(stored)
        except EdgeError as error:
            log.error("run %s: %s; trying again in %g s", run, error, DISK_RETRY_S)  # noqa: TRY400 - one line
            self._set_aside.add(run)
            self.loop.call_later(DISK_RETRY_S, lambda: self._take_up_again(run))
            return
        if stored.stop_reason is not None:
            self._step(run, e.StopRequested(self.clock(), stored.stop_reason))

    def _carry_out(self, run: str, effect: e.Effect) -> None:  # noqa: C901 - one arm per effect
        match effect:
            case e.Save(rows):
                self.store.save(rows)
                self._log_rows(run, rows)
            case e.SendJob(assignment):
                self._send_job(run, assignment)
            case e.SendStanding(assignment):
                self._send_standing(run, assignment)
            case e.SendCancel(device, assignment, reason):
                self._send(run, device, messages.Cancel(run=run, assignment=assignment, reason=reason))
            case e.Fetch(update, blob, meta):
                offer = self._offer or messages.UpdateOffer(update=update, blob=blob, meta=meta)
                self._fetch(run, offer)
            case e.SendDone(update):
                self._send(run, update.device, messages.Done(update=update))
            case e.SendVerdict(update, counted, reason, ends):
                self._send_verdict(update, counted=counted, reason=reason, ends=ends)
            case e.AnswerFromStore(update, ends):
                self._answer_from_store(update, ends=ends)
            case e.Aggregate():
                self._aggregate(run, effect)
            case e.Evaluate(version, model):
                self._evaluate(run, version, model)
            case e.Finished(status, reason):
                self._finished(run, status, reason)

    def _log_rows(self, run: str, rows: list[e.Row]) -> None:
        for row in rows:
            if isinstance(row, e.UpdateRow) and row.verdict == "refused":
                log.warning("update %s refused: %s", row.update, row.reason)
            elif isinstance(row, LedgerRow):
                if row.stopped:
                    log.info("device %s ended job %s/%s early: %s", row.device, run, row.assignment, row.stopped)
                if row.note:
                    log.warning("device %s, job %s/%s reports %s", row.device, run, row.assignment, row.note)
            elif isinstance(row, e.RoundRow):
                self._log_round(run, row)

    def _log_round(self, run: str, row: e.RoundRow) -> None:
        """One line per closed round, once its model was evaluated if that is wanted."""
        state = self.runs[run]
        if row.test is None and state.is_evaluated(row.version):
            return
        measured = accuracy(row.test if row.test is not None else row.devices)
        log.info(
            "run %s: round %d of %d: %s (%d late), accuracy %s, %s up, %s down, %.2f s",
            run,
            row.round + 1,
            state.plan.rounds,
            counted(row.updates, "update"),
            row.late_updates,
            percent(measured),
            size(row.bytes_up),
            size(row.bytes_down),
            row.closed_unix_s - row.opened_unix_s,
        )

    def _send_job(self, run: str, assignment: e.AssignmentRow) -> None:
        if not self._reaches(assignment.device):
            return  # DeviceJoined repeats it
        state = self.runs[run]
        model, chunk_bytes = state.model_of(assignment), self.link.chunk_bytes
        inline = inline_bytes(self.store.blobs, model, chunk_bytes, state.plan.participation.target)
        job = make_job(
            state.plan, state.run, assignment, model, now=self.clock(), chunk_bytes=chunk_bytes, inline=inline
        )
        self.files[run].sends(*job.model.blobs)
        wanted = job.model.blobs[:-1] if inline else job.model.blobs
        self.downlink.expect(assignment.device, job.bundle, *wanted)
        self._send(run, assignment.device, job)

    def _send_standing(self, run: str, assignment: e.AssignmentRow) -> None:
        if not self._reaches(assignment.device):
            return  # DeviceJoined repeats it
        state = self.runs[run]
        standing = make_standing(state.plan, state.run, assignment, chunk_bytes=self.link.chunk_bytes)
        self.downlink.expect(assignment.device, standing.bundle)
        self._send(run, assignment.device, standing)

    def _reaches(self, name: str) -> bool:
        device = self.fleet.get(name)
        return device is not None and device.online and self.link.is_up

    def _fetch(self, run: str, offer: messages.UpdateOffer) -> None:
        files = self.files[run]
        assert offer.blob is not None
        if offer.update in self._checks:
            return  # all of it is here
        reason = files.unfit(offer.blob)
        if reason:
            self._step(run, e.UpdateDamaged(self.clock(), offer.update, offer.blob, offer.meta, reason))
            return
        self.uplink.fetch(self.store.blobs, offer)

    def _on_arrived(self, update: UpdateId, blob: BlobRef, meta: UpdateMeta) -> None:
        state, files = self.runs.get(update.run), self.files.get(update.run)
        assignment = None if state is None else state.assignments.get(update.assignment)
        if files is None or update in self._checks:
            return
        if assignment is None:
            self._step(update.run, e.UpdateArrived(self.clock(), update, blob, meta))  # is answered from the store
            return

        def checked(reason: str) -> None:
            if self.runs.get(update.run) is not state:
                return  # the run ended, or was put aside: the device offers its update again
            if reason:
                _tidy(lambda: files.drop_damaged(blob))
                self._step(update.run, e.UpdateDamaged(self.clock(), update, blob, meta, reason))
            else:
                self._tell_doubts(assignment, meta)
                self._step(update.run, e.UpdateArrived(self.clock(), update, blob, meta))

        self._checks.run(files.check(update, blob, assignment), checked)

    def _tell_doubts(self, assignment: e.AssignmentRow, meta: UpdateMeta) -> None:
        """Says once of a device that what it says is not believed; its update counts all the same."""
        name = (assignment.run, assignment.device)
        elapsed_s = max(self.clock(), assignment.deadline_unix_s) - assignment.assigned_unix_s
        doubts = believed(meta, steps=assignment.steps, elapsed_s=elapsed_s).doubts
        if doubts and name not in self._doubted:
            self._doubted.add(name)
            log.warning("device %s, run %s reports %s: taken as unknown", *reversed(name), " and ".join(doubts))

    def _on_refused(self, update: UpdateId, blob: BlobRef, meta: UpdateMeta, reason: str) -> None:
        self._step(update.run, e.UpdateDamaged(self.clock(), update, blob, meta, reason))

    def _answer_from_store(self, update: UpdateId, *, ends: bool) -> None:
        row = self.store.stored_verdict(update)
        if row is None and update.run not in self.runs and self.store.is_active(update.run):
            return  # the run is about to be taken up, the device will offer again
        if row is None:  # without an answer the device could never train for this run again
            known = "the coordinator knows no such run or assignment"
            reason = "its assignment is unknown here, or too long ago to count" if update.run in self.runs else known
            log.warning("update %s refused: %s", update, reason)
            self._send_verdict(update, counted=False, reason=reason, ends=ends)
        elif row.verdict == "pending":
            self._send(update.run, update.device, messages.Done(update=update))
        else:
            over = ends and (update.run in self.runs or not self.store.is_active(update.run))
            self._send_verdict(update, counted=row.verdict == "counted", reason=row.reason, ends=over)

    def _send_verdict(self, update: UpdateId, *, counted: bool, reason: str, ends: bool) -> None:
        message = messages.Verdict(update=update, counted=counted, reason=reason, ends=ends)
        self._send(update.run, update.device, message)

    def _aggregate(self, run: str, effect: e.Aggregate) -> None:
        files = self.files[run]

        def done(made: Made) -> None:
            moved = self.traffic.take(run)
            event = e.Aggregated(
                self.clock(),
                effect.round,
                **made._asdict(),
                bytes_up=moved.up,
                bytes_down=moved.down,
                bytes_bundle=moved.bundle,
            )
            replaced = list(effect.table.values())
            self._step(run, event)
            self._clean(run, replaced)

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

    def _clean(self, run: str, replaced: list[BlobRef]) -> None:
        files, state = self.files.get(run), self.runs.get(run)
        if files is not None and state is not None:
            _tidy(lambda: files.clean(state))
            _tidy(lambda: files.drop_replaced(state, replaced))

    def _finished(self, run: str, status: str, reason: str) -> None:
        log.info("run %s %s%s", run, status, f": {reason}" if reason else "")
        self.uplink.stop_run(run)
        self._doubted = {name for name in self._doubted if name[0] != run}
        files = self.files.pop(run, None)
        if files is not None:
            others = {sha256 for other in self.files.values() for sha256 in other.sent_blobs}
            for sha256 in files.sent_blobs.keys() - others:
                self.downlink.forget(sha256)
        state, moved = self.runs.pop(run, None), self.traffic.take(run)
        if state is not None:
            state.run.bytes_up, state.run.bytes_down = moved.up, moved.down
            _tidy(lambda: self.store.save([state.run]))
            self.fleet.forget(state.need)
            if files is not None:
                _tidy(lambda: files.clean_up(state))
        timer = self._ticks.pop(run, None)
        if timer is not None:
            timer.cancel()

    def _on_chunk_sent(self, device: str, sha256: str, topic: str, payload_bytes: int) -> None:
        run = self._run_that_sent(device, sha256)
        if run is not None:
            bundle = sha256 == self.runs[run].run.bundle.sha256
            self.traffic.down(run, topic, payload_bytes, bundle=bundle)

    def _run_that_sent(self, device: str, sha256: str) -> str | None:
        """The run for which a device asks for a blob; one where it has work, if several send it."""
        found = None
        for run, files in self.files.items():
            if sha256 in files.sent_blobs and run in self.runs:
                if device in self.runs[run].busy:
                    return run
                found = found or run
        return found

    def _find_blob(self, sha256: str) -> tuple[Path, BlobRef] | None:
        for files in self.files.values():
            blob = files.sent_blobs.get(sha256)
            if blob is not None:
                return self.store.blobs.path(sha256), with_chunk_size(blob, self.link.chunk_bytes)
        return None


def _tidy(action: Callable[[], None]) -> None:
    """Deleting what is no longer needed, or noting the last bytes, may fail without harm."""
    try:
        action()
    except (StorageError, StoreError) as error:
        log.error("%s; the run goes on", error)  # noqa: TRY400 - one line for the operator
