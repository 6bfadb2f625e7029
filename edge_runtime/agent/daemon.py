"""The agent: connects link, job machine, spool, transfers and worker. All decisions are in :mod:`.jobs`."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import msgspec

import edge_runtime
from edge_runtime import compression, messages, methods, telemetry, topics
from edge_runtime.agent import events, jobs, pipe
from edge_runtime.agent.config import MB, check_agent_config, link_settings
from edge_runtime.agent.health import unhealthy
from edge_runtime.agent.job_energy import UNTOLD, Worked, described
from edge_runtime.agent.joules import Joules
from edge_runtime.agent.own_cpu import OwnCpu
from edge_runtime.agent.radio import radio_of
from edge_runtime.agent.supervisor import Supervisor
from edge_runtime.agent.transfers import DISK_RETRY_S, Downloads, Uploads
from edge_runtime.errors import EdgeError, StorageError
from edge_runtime.files import lock_folder, storage_error, write_durably
from edge_runtime.store.blobs import BlobStore
from edge_runtime.store.models import HeldModels
from edge_runtime.store.spool import RunChange, Spool
from edge_runtime.transport.link import CHUNK_BYTES, Link, check_tls
from edge_runtime.transport.loop import Loop
from edge_runtime.transport.transfer import ChunkPump

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.messages import BlobRef

log = logging.getLogger("edge.agent")

TICK_S = 5.0
EARLIEST_CLOCK_UNIX_S = 1_767_225_600.0  # 2026-01-01: a clock before this was never set
TAKEOVER_LOSSES = 4
ANNOUNCE_INTERVAL_S = 60.0  # between announcements of how many samples there are
ANNOUNCE_CHANGE = 0.1


class Agent:
    """One device. :meth:`run` returns after :meth:`stop` was called from a signal handler or another thread.

    Example:
        >>> from edge_runtime import Agent  # doctest: +SKIP
        >>> Agent(load_agent_config(Path("agent.toml"))).run()  # doctest: +SKIP

    Raises:
        ConfigError: the configuration cannot be used, or another agent runs on this state folder.
        StorageError: the state folder cannot be used.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        loop: Loop | None = None,
        clock: Callable[[], float] = time.time,
        energy_root: Path = Path("/"),
    ) -> None:
        check_agent_config(config)
        check_tls(link_settings(config))  # before anything is opened
        self.config = config
        self.loop = loop or Loop()
        self._clock = clock
        self._energy_root = energy_root  # tests bring a tree of files that sensors are read from
        self._owns_loop = loop is None
        self._started_s = time.monotonic()
        folder = Path(config.state_dir)
        self._lock = lock_folder(
            folder, "another agent runs on this state_dir; stop it, or give each agent its own name and folder"
        )
        self.instance = _instance(folder)
        random = Random(f"{config.device}/{self.instance}")
        limits = config.limits
        self.spool = Spool(folder)
        self.cache = BlobStore(folder / "cache", int(limits.blob_mb * MB))
        self.cache.sweep()
        self.models = HeldModels(folder / "models")
        capabilities = jobs.Capabilities(
            datasets=frozenset(data.name for data in config.data),
            codecs=frozenset(compression.codec_names()),
            methods=frozenset(methods.method_names()),
            blob_limit_bytes=int(limits.blob_mb * MB),
        )
        self.state = jobs.AgentState.restore(config.device, capabilities, self.spool.open_updates())
        self._session = 0
        self._coordinator_session = ""
        self._samples: dict[str, int] = {}
        self._announced_samples: dict[str, int] = {}
        self._next_announcement_s = 0.0
        self._next_telemetry_s = 0.0
        self._hurries = False  # training may not run, and what ran had no time to send what it reached
        self.link = Link(
            link_settings(config),
            self.loop,
            topics=[topics.COORDINATOR, *(topics.to_device(config.device, leaf) for leaf in ("message", "chunk"))],
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=self._on_down,
            random=random,
            will=(topics.from_device(config.device, "state"), self._last_will),
        )
        self.pump = ChunkPump(self.link)
        self.uploads = Uploads(config.device, self.spool, self.loop, self.link, pump=self.pump, random=random)
        self.downloads = Downloads(
            config.device,
            self.cache,
            self.loop,
            self.link,
            on_ready=lambda sha: self._step(events.BlobReady(self.loop.now(), sha)),
            on_failed=lambda sha, reason: self._step(events.BlobFailed(self.loop.now(), sha, reason)),
        )
        self.supervisor = Supervisor(limits, self.loop, on_reply=self._on_reply, on_end=self._on_worker_end)
        self.joules = Joules(
            self.loop,
            job_joules=limits.job_joules,
            on_limit=lambda reason: self._step(events.LimitReached(reason)),
            on_source=self._announce,
        )
        self._fetched: dict[str, int] = {}  # bytes that came over the network, by blob, until their job is done

    def run(self) -> None:
        """Runs until :meth:`stop`."""
        self.start()
        try:
            self.loop.run()
        finally:
            self.close()

    def start(self) -> None:
        """Connects; the loop does the rest.

        Raises:
            ConfigError: no such sensor of energy.
        """
        own_cpu = self.config.energy.modelled_of == "agent"
        busy_s = OwnCpu(lambda: self.supervisor.pid).read if own_cpu else None
        self.joules.start(self.config.energy, busy_s=busy_s, root=self._energy_root)
        self._connect_when_clock_is_set()
        self.loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        """Ends :meth:`run`; may be called from a signal handler or another thread."""
        self.loop.stop()

    def close(self) -> None:
        """Says good-bye, kills the worker and frees everything. Finished updates wait in the spool."""
        self.supervisor.close()
        self.joules.close()
        self.downloads.close()
        self.link.stop((topics.from_device(self.config.device, "state"), self._announcement(online=False)))
        self.spool.close()
        os.close(self._lock)
        if self._owns_loop:
            self.loop.close()

    # The link

    def _connect_when_clock_is_set(self) -> None:
        if self.link.address.tls and self._clock() < EARLIEST_CLOCK_UNIX_S:
            date = time.strftime("%Y-%m-%d", time.gmtime(self._clock()))
            log.warning("the clock says %s: waiting for time synchronisation, TLS cannot check certificates", date)
            self.loop.call_later(TICK_S, self._connect_when_clock_is_set)
            return
        self.link.start()

    def _last_will(self) -> bytes:
        """The will of the connection that begins now. It names the session that this connection will announce."""
        self._session += 1
        return self._announcement(online=False)

    def _on_up(self) -> None:
        self._announce()
        self.downloads.on_up()
        self._send_telemetry(telemetry.measure(self._started_s, self.link.sent_bytes, self.link.received_bytes))
        self._step(events.Connected())

    def _on_down(self, _reason: str) -> None:
        self.pump.reset()
        if self.link.rapid_losses == TAKEOVER_LOSSES:
            log.error(
                "the broker keeps ending this connection: is another agent running as device %r? Give each device its "
                "own name and certificate (or the certificate belongs to another device name: write that as device)",
                self.config.device,
            )

    def _announce(self) -> None:
        self._announced_samples = dict(self._samples)
        self._next_announcement_s = self.loop.now() + ANNOUNCE_INTERVAL_S
        self.link.publish(topics.from_device(self.config.device, "state"), self._announcement(online=True), retain=True)

    def _samples_are_news(self) -> bool:
        told = self._announced_samples
        return any(
            name not in told or abs(count - told[name]) > ANNOUNCE_CHANGE * told[name]
            for name, count in self._samples.items()
        )

    def _announcement(self, *, online: bool) -> bytes:
        can = self.state.capabilities
        return messages.encode(
            messages.DeviceState(
                device=self.config.device,
                online=online,
                session=f"{self.instance}-{os.getpid()}-{self._session}",
                instance=self.instance,
                software=edge_runtime.__version__,
                platform=telemetry.machine(),
                codecs=sorted(can.codecs),
                methods=sorted(can.methods),
                backends=["onnxruntime"],
                datasets=[
                    messages.DatasetInfo(name=name, samples=self._samples.get(name)) for name in sorted(can.datasets)
                ],
                limits=messages.Limits(
                    blob_bytes=can.blob_limit_bytes,
                    worker_memory_bytes=int((self.config.limits.worker_memory_mb or 0) * MB),
                ),
                energy=self.joules.source,
            )
        )

    def _send(self, message: messages.FromDevice) -> None:
        self.link.publish(topics.from_device(self.config.device, "message"), messages.encode(message))

    def _on_message(self, topic: str, payload: bytes) -> None:
        try:
            if topic.endswith("/message") or topic == topics.COORDINATOR:
                self._handle(messages.decode_from_coordinator(payload))
            else:
                self.downloads.on_chunk(payload)
        except EdgeError as error:
            log.warning("%s: %s", topic, error)

    def _handle(self, message: messages.FromCoordinator) -> None:  # noqa: C901 - one arm per message
        now = self.loop.now()
        match message:
            case messages.Job():
                update = messages.UpdateId(message.run, self.config.device, message.assignment, 0)
                known = self.spool.get(update)
                crashes = self.spool.crashes(message.bundle.sha256)
                state = known.state if known else None
                self._step(events.JobArrived(now, message, state, crashes, self._holds_base(message)))
            case messages.Cancel(run=run, assignment=assignment):
                self._step(events.JobCancelled(run, assignment))
            case messages.Need():
                if not self.uploads.on_need(message):
                    self._send(messages.Gone(sha256=message.sha256))
            case messages.Gone(sha256=sha256):
                self.downloads.on_gone(sha256)
            case messages.Done(update=update):
                self._step(events.DoneArrived(update))
            case messages.Verdict(update=update, counted=counted, reason=reason):
                self._step(events.VerdictArrived(now, update, counted, reason))
            case messages.CoordinatorState(online=online, session=session):
                if online and session != self._coordinator_session:
                    known_before, self._coordinator_session = self._coordinator_session, session
                    if known_before:  # a new coordinator process: it may have missed what was said meanwhile
                        self._on_up()

    # Effects

    def _step(self, event: events.Event) -> None:
        for effect in jobs.step(self.state, event):
            try:
                self._carry_out(effect)
            except EdgeError as error:  # a full disk must not end the agent; what was not noted is told again
                log.error("%s", error)  # noqa: TRY400 - one line for the user
        if self._fetched:
            self._forget_fetched()

    def _forget_fetched(self) -> None:
        """However a job ended: what came for it is of no other job, unless that needs it too."""
        needed = {sha256 for entry in self.state.jobs.values() for sha256 in _blobs_of(entry.job)}
        for sha256 in self._fetched.keys() - needed:
            del self._fetched[sha256]

    def _carry_out(self, effect: events.Effect) -> None:  # noqa: C901, PLR0912 - one arm per effect
        match effect:
            case events.FetchBlob(blob, inline):
                self._make_room(blob)
                if not self.cache.has(blob.sha256):
                    self._fetched[blob.sha256] = blob.size_bytes
                self.downloads.fetch(blob, inline)
            case events.StopFetch(sha256):
                self._fetched.pop(sha256, None)
                self.downloads.stop(sha256)
            case events.StartTraining(job):
                self._start_training(job)
            case events.StopEarly(reason):
                log.warning("training ends early: %s", reason)
                self.supervisor.stop_early(reason)
            case events.StopTraining(reason):
                self.supervisor.kill(reason)
            case events.SpoolUpdate(spooled, change):
                self._until_written(
                    lambda: self.spool.add(spooled, change), lambda: self.uploads.offer(spooled.update, push=True)
                )
            case events.Offer(update, push):
                self.uploads.offer(update, push=push)
            case events.CloseUpdate(update, state, reason):
                self.uploads.delivered(update)
                if state != "delivered":
                    self.uploads.close(update)
                    log.info("update %s: %s%s", update, state, f": {reason}" if reason else "")
                self._until_written(lambda: self.spool.set_state(update, state, reason))
            case events.Report(status):
                if status.reason:
                    log.warning("job %s/%s %s: %s", status.run, status.assignment, status.status, status.reason)
                self._send(status)
            case events.CountCrash(bundle):
                self.spool.crashed(bundle)
            case events.ForgiveCrashes(bundle):
                self.spool.forgive(bundle)

    def _until_written(self, write: Callable[[], None], then: Callable[[], None] | None = None) -> None:
        """A full disk must not lose a finished update or a verdict: it is tried until it is written.

        ``then`` follows only where the first attempt failed; else the next effect does that.
        """
        try:
            write()
        except StorageError as error:
            log.error("%s; trying again in %g s", error, DISK_RETRY_S)  # noqa: TRY400 - one line, the user's disk is full
            self.loop.call_later(DISK_RETRY_S, lambda: self._until_written(lambda: self._both(write, then)))

    @staticmethod
    def _both(write: Callable[[], None], then: Callable[[], None] | None) -> None:
        write()
        if then is not None:
            then()

    def _make_room(self, blob: BlobRef) -> None:
        """Before a blob comes, blobs and held models together go below their quota: models of other runs first."""
        if self.cache.has(blob.sha256):
            return
        room = int(self.config.limits.cache_mb * MB) - blob.size_bytes
        jobs_ = [entry.job for entry in self.state.jobs.values()]
        needed = {sha256 for job in jobs_ for sha256 in _blobs_of(job)}
        try:
            pinned = {run: self._pinned(run) for run in self.spool.runs()}
            self.models.evict(max(0, room - self.cache.used_bytes()), pinned, {job.run for job in jobs_})
            self.cache.evict(max(0, room - self.models.used_bytes()), needed)
        except (OSError, StorageError) as error:
            log.error("%s: cannot be cleaned (%s)", self.cache.folder, error)  # noqa: TRY400 - one line

    def _holds_base(self, job: messages.Job) -> bool:
        """Whether the version that a job builds on is here."""
        return job.model.base is None or self.models.has(job.run, job.model.base)

    def _start_training(self, job: messages.Job) -> None:
        spool_mb = self.config.limits.spool_mb
        event: events.Event
        try:
            if not self._holds_base(job):
                event = events.ModelLost(self.loop.now())
            elif not self.spool.make_room(int(spool_mb * MB), job.run):
                reason = (
                    f"the spool holds more than limits.spool_mb = {spool_mb:g}: updates that wait for their verdict, "
                    "or for a job that sends them again, come first"
                )
                event = events.TrainingFailed(self.loop.now(), reason)
            else:
                request = self._train_request(job)
                self.joules.job_begins(job)
                self.supervisor.request(request)
                return
        except StorageError as error:
            event = events.TrainingFailed(self.loop.now(), str(error))
        self.loop.call_soon(lambda: self._step(event))

    def _train_request(self, job: messages.Job) -> pipe.TrainRequest:
        return pipe.TrainRequest(
            job=job,
            device=self.config.device,
            bundle_path=str(self.cache.path(job.bundle.sha256)),
            model_paths=[str(self.cache.path(blob.sha256)) for blob in job.model.blobs],
            output_folder=str(self.spool.folder),
            dataset=next(data for data in self.config.data if data.name == job.dataset),
            models_folder=str(self.models.folder),
            state_path=str(self.spool.run_state(job.run) or ""),
            refused=[
                pipe.RefusedUpdate(update=refused.update, path=str(self.spool.path(refused)), key=refused.key)
                for refused in self.spool.refused(job.run)
            ],
            pinned=self._pinned(job.run),
            threads=self.config.limits.worker_threads,
            code_dir=self.config.code_dir,
        )

    def _pinned(self, run: str) -> list[int]:
        """Versions of a run's model that waiting jobs build on, or updates that may yet come back."""
        waiting = {job.model.base for job in (entry.job for entry in self.state.jobs.values()) if job.run == run}
        return sorted({*self.spool.needed_versions(run), *(base for base in waiting if base is not None)})

    def _on_reply(self, reply: pipe.FromWorker) -> None:
        match reply:
            case pipe.Trained():
                self._on_trained(reply)
            case pipe.Failed(reason=reason):
                self._on_failed(reason)
            case pipe.PhaseBegun(phase=phase):
                self.joules.phase_begins(phase)
                self._step(events.PhaseBegun(phase))
            case pipe.Progress(step=step, steps_total=total, loss=loss):
                log.info("training step %d of %d, loss %.4f", step, total, loss)
            case pipe.Ready():
                return

    def _energy_used(self, sent_bytes: int, worked: Worked = UNTOLD) -> messages.EnergyUse | None:
        """What the running job drew until now, with the radio's share of what came for it and will be sent."""
        if self.state.running is None:
            return None
        job = self.state.jobs[self.state.running].job
        received_bytes = sum(self._fetched.pop(sha256, 0) for sha256 in _blobs_of(job))
        radio = radio_of(self.config.energy, self.link.local_host, self._energy_root)
        use = self.joules.job_ends(radio.joules(sent_bytes, received_bytes), worked)
        if use is not None:
            log.info("job %s/%s drew %s", job.run, job.assignment, described(use))
        return use

    def _on_failed(self, reason: str) -> None:
        key = self.state.running
        energy = self._energy_used(0)
        if key is not None and not self._holds_base(self.state.jobs[key].job):  # the worker found it damaged
            log.warning("job %s/%s: %s", *key, reason)
            self._step(events.ModelLost(self.loop.now(), energy))
        else:
            self._step(events.TrainingFailed(self.loop.now(), reason, energy))

    def _on_trained(self, done: pipe.Trained) -> None:
        now, meta = self.loop.now(), done.meta
        worked = Worked(done.train_s, done.compress_s, done.train_cpu_s, done.compress_cpu_s)
        energy = self._energy_used(done.size_bytes, worked)
        meta = msgspec.structs.replace(meta, energy=energy)
        if self.state.running is not None:
            run, assignment = self.state.running
            self._samples[self.state.jobs[run, assignment].job.dataset] = done.dataset_samples
            log.info(
                "job %s/%s: %d samples in %.1f s, %d bytes encoded in %d ms of CPU, %d bytes written",
                *(run, assignment, meta.samples, meta.train_ms / 1000),
                *(done.size_bytes, meta.encode_cpu_ms, meta.written_bytes),
            )
        path, sha256 = done.path, done.sha256
        change = RunChange(Path(done.state_path).name, tuple(done.returned)) if path else None
        if not path:  # only evaluated: the result travels as an update without bytes
            try:
                path, sha256 = self._empty_update()
            except OSError as error:
                self._step(events.TrainingFailed(now, str(storage_error(self.spool.folder, error)), energy))
                return
        chunk_bytes = self.link.chunk_bytes if self.link.is_up else CHUNK_BYTES
        blob = messages.BlobRef(sha256=sha256, size_bytes=done.size_bytes, chunk_bytes=chunk_bytes)
        self._step(events.Trained(now, Path(path).name, blob, meta, done.key, change))
        self.models.prune_runs(self.spool.runs() | {name for name, _ in self.state.jobs})

    def _empty_update(self) -> tuple[str, str]:
        path = self.spool.folder / "empty.update"
        path.touch()
        return str(path), hashlib.sha256(b"").hexdigest()

    def _on_worker_end(self, reason: str, ours: bool) -> None:
        if self.state.running is not None:
            try:
                self.spool.drop_unfinished(*self.state.running)
            except (OSError, StorageError) as error:
                log.warning("%s: cannot be cleaned (%s)", self.spool.folder, error)
        self._step(events.WorkerCrashed(self.loop.now(), reason, ours, self._energy_used(0)))

    # Health

    def _tick(self) -> None:
        self.joules.tick()
        limits = self.config.limits
        limited = (limits.max_temperature_c, limits.min_battery_percent, limits.min_free_memory_mb) != (None,) * 3
        tells = self.link.is_up and self.loop.now() >= self._next_telemetry_s
        if limited or tells:  # once for both: the CPU's load is measured since the last time
            measured = telemetry.measure(self._started_s, self.link.sent_bytes, self.link.received_bytes)
            self._check_health(measured)
            if tells:
                self._send_telemetry(measured)
        if self.link.is_up and self.loop.now() >= self._next_announcement_s and self._samples_are_news():
            self._announce()
        self._step(events.Tick(self.loop.now()))
        self.loop.call_later(TICK_S, self._tick)

    def _send_telemetry(self, measured: messages.Telemetry) -> None:
        self._next_telemetry_s = self.loop.now() + self.config.telemetry_interval_s
        telemetry.release_memory()
        self._send(measured)

    def _check_health(self, measured: messages.Telemetry) -> None:
        found = unhealthy(measured, self.config)
        paused, hurries = bool(self.state.paused), found is not None and not found.keeps_work
        if (found is not None) != paused or (hurries and not self._hurries):  # figures in reasons change all the time
            log.warning("training paused: %s", found.reason) if found else log.info("training may run again")
            reason, keeps_work = found or ("", False)
            self._step(events.Paused(self.loop.now(), reason, keeps_work))
        self._hurries = hurries


def _blobs_of(job: messages.Job) -> list[str]:
    return [blob.sha256 for blob in (job.bundle, *job.model.blobs)]


def _instance(folder: Path) -> str:
    """A random name of this installation, made once."""
    path = folder / "instance"
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    name = os.urandom(8).hex()
    write_durably(path, name.encode())
    return name
