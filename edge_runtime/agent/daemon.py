"""The agent: connects link, job machine, spool, transfers and worker. All decisions are in :mod:`.jobs`."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import msgspec

from edge_runtime import compression, messages, methods, telemetry, topics
from edge_runtime.agent import events, jobs, limits, pipe
from edge_runtime.agent.anarchic import StandingWork
from edge_runtime.agent.announcement import announcement, is_news
from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import MB, check_agent_config, link_settings
from edge_runtime.agent.hours import EARLIEST_CLOCK_UNIX_S
from edge_runtime.agent.job_energy import UNTOLD, Worked, described
from edge_runtime.agent.job_files import JobFiles, blobs_of
from edge_runtime.agent.joules import Joules
from edge_runtime.agent.own_cpu import OwnCpu
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

log = logging.getLogger("edge.agent")

TICK_S = 5.0
TAKEOVER_LOSSES = 4
ANNOUNCE_INTERVAL_S = 60.0  # between announcements of how many samples there are


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
        folder = Path(config.state_dir)
        self._lock = lock_folder(
            folder, "another agent runs on this state_dir; stop it, or give each agent its own name and folder"
        )
        self.instance = _instance(folder)
        random = Random(f"{config.device}/{self.instance}")
        blob_limit_bytes = int(config.limits.blob_mb * MB)
        self.spool = Spool(folder)
        self.cache = BlobStore(folder / "cache", blob_limit_bytes)
        self.cache.sweep()
        self.models = HeldModels(folder / "models")
        capabilities = jobs.Capabilities(
            datasets=frozenset(data.name for data in config.data),
            codecs=frozenset(compression.codec_names()),
            methods=frozenset(methods.method_names()),
            blob_limit_bytes=blob_limit_bytes,
        )
        self.state = jobs.AgentState.restore(config.device, capabilities, self.spool.open_updates())
        self.files = JobFiles(config, self.state, self.spool, self.cache, self.models)
        self.conditions = Conditions(config, clock=clock, monotonic=self.loop.now, root=energy_root)
        self._watches = False  # nothing can pause training before the link is there, nor without limits
        self._unknown: list[str] = []
        self._session = 0
        self._coordinator_session = ""
        self._samples: dict[str, int] = {}
        self._announced: dict[str, float] = {}
        self._next_announcement_s = 0.0
        self._next_heartbeat_s = 0.0
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
        self.uploads = Uploads(
            config.device,
            self.spool,
            self.loop,
            self.link,
            pump=self.pump,
            random=random,
            rate=self.conditions.up,
        )
        self.downloads = Downloads(
            config.device,
            self.cache,
            self.loop,
            self.link,
            on_ready=lambda sha: self._step(events.BlobReady(self.loop.now(), sha)),
            on_failed=lambda sha, reason: self._step(events.BlobFailed(self.loop.now(), sha, reason)),
            rate=self.conditions.down,
        )
        self.supervisor = Supervisor(config.limits, self.loop, on_reply=self._on_reply, on_end=self._on_worker_end)
        self.joules = Joules(
            self.loop,
            job_joules=config.limits.job_joules,
            on_limit=lambda reason: self._step(events.LimitReached(reason)),
            on_source=self._announce,
        )
        self.standing = StandingWork(
            folder,
            config.limits,
            random,
            loop=self.loop,
            spool=self.spool,
            jobs=self.state,
            known=lambda: self.conditions.known(self._samples),
            link=self.link,
            send=self._send,
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
        log.info("limits in force: %s", ", ".join(limits.in_force(self.config.limits)) or "none")
        self._connect_when_clock_is_set()
        self.loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        """Ends :meth:`run`; may be called from a signal handler or another thread."""
        self.loop.stop()

    def close(self) -> None:
        """Says good-bye, kills the worker and frees everything. Finished updates wait in the spool."""
        self.supervisor.close()
        self.standing.close()
        self.joules.close()
        self.conditions.save()
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
        self.conditions.connected(self.link.local_host)
        self._send_heartbeat()  # first, so that who selects when this device joins knows how it is now
        self._announce()
        self.downloads.on_up()
        if limits.in_force(self.config.limits):
            self._watches = True
            self._tell_unknown()
        self._step(events.Connected())

    def _on_down(self, _reason: str) -> None:
        self.pump.reset()
        self.conditions.disconnected()
        if self.link.rapid_losses == TAKEOVER_LOSSES:
            log.error(
                "the broker keeps ending this connection: is another agent running as device %r? Give each device its "
                "own name and certificate (or the certificate belongs to another device name: write that as device)",
                self.config.device,
            )

    def _announce(self) -> None:
        self._announced = self._figures()
        self._next_announcement_s = self.loop.now() + ANNOUNCE_INTERVAL_S
        self.link.publish(topics.from_device(self.config.device, "state"), self._announcement(online=True), retain=True)

    def _figures(self) -> dict[str, float]:
        """What is announced and may change: samples by dataset, and the battery's capacity."""
        capacity_wh = self.conditions.battery_wh
        return {**self._samples, **({} if capacity_wh is None else {"battery_wh ": capacity_wh})}

    def _announcement(self, *, online: bool) -> bytes:
        said = announcement(
            self.config,
            self.state.capabilities,
            online=online,
            instance=self.instance,
            session=self._session,
            samples=self._samples,
            energy=self.joules.source,
            battery_wh=self.conditions.battery_wh,
        )
        return messages.encode(said)

    def _send_heartbeat(self) -> None:
        self._next_heartbeat_s = self.loop.now() + self.config.heartbeat_interval_s
        telemetry.release_memory()
        said = messages.encode_heartbeat(self.conditions.heartbeat())
        self.link.publish(topics.from_device(self.config.device, "heartbeat"), said, retain=True)

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
                self._on_job(message)
            case messages.Standing():
                self.standing.told(message)
                self.standing.look()
            case messages.Cancel(run=run, assignment=assignment):
                self.standing.told(message)
                self._step(events.JobCancelled(run, assignment))
            case messages.Need():
                if not self.uploads.on_need(message):
                    self._send(messages.Gone(sha256=message.sha256))
            case messages.Gone(sha256=sha256):
                self.downloads.on_gone(sha256)
            case messages.Done(update=update):
                self._step(events.DoneArrived(update))
            case messages.Verdict(update=update, counted=counted, reason=reason):
                self.standing.told(message)
                self._step(events.VerdictArrived(now, update, counted, reason))
            case messages.CoordinatorState(online=online, session=session):
                if online and session != self._coordinator_session:
                    known_before, self._coordinator_session = self._coordinator_session, session
                    if known_before:  # a new coordinator process: it may have missed what was said meanwhile
                        self._on_up()

    def _on_job(self, job: messages.Job) -> None:
        spooled = self.spool.get(jobs.update_of(job, self.config.device))
        crashes = self.spool.crashes(job.bundle.sha256)
        state = spooled.state if spooled else None
        known = self.conditions.known(self._samples, self.files.missing_bytes(job))
        declined = limits.decline(job, known, self.config.limits)
        if declined is not None and declined.slow:
            self.conditions.doubt(job.bundle.sha256)
        self.standing.told(job)
        held = self.files.holds_base(job)
        self._step(events.JobArrived(self.loop.now(), job, state, crashes, held, declined))

    # Effects

    def _step(self, event: events.Event) -> None:
        for effect in jobs.step(self.state, event):
            try:
                self._carry_out(effect)
            except EdgeError as error:  # a full disk must not end the agent; what was not noted is told again
                log.error("%s", error)  # noqa: TRY400 - one line for the user
        if self._fetched:
            self._forget_fetched()
        self.standing.look()

    def _forget_fetched(self) -> None:
        """However a job ended: what came for it is of no other job, unless that needs it too."""
        needed = {blob.sha256 for entry in self.state.jobs.values() for blob in blobs_of(entry.job)}
        for sha256 in self._fetched.keys() - needed:
            del self._fetched[sha256]

    def _carry_out(self, effect: events.Effect) -> None:  # noqa: C901, PLR0912 - one arm per effect
        match effect:
            case events.FetchBlob(blob, inline):
                self.files.make_room(blob)
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
                self.standing.done(effect)
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
                self.standing.done(effect)
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

    def _start_training(self, job: messages.Job) -> None:
        event: events.Event
        try:
            if not self.files.holds_base(job):
                event = events.ModelLost(self.loop.now())
            elif full := self.files.spool_is_full(job):
                event = events.TrainingFailed(self.loop.now(), full)
            else:
                request = self.files.request(job)
                self.joules.job_begins(job, self.conditions.joules_left())
                self.supervisor.request(request)
                return
        except StorageError as error:
            event = events.TrainingFailed(self.loop.now(), str(error))
        self.loop.call_soon(lambda: self._step(event))

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

    def _energy_used(self, sent_bytes: int, worked: Worked = UNTOLD, steps: int = 0) -> messages.EnergyUse | None:
        """What the running job drew until now, with the radio's share of what came for it and will be sent."""
        if self.state.running is None:
            return None
        job = self.state.jobs[self.state.running].job
        received_bytes = sum(self._fetched.pop(blob.sha256, 0) for blob in blobs_of(job))
        use = self.joules.job_ends(self.conditions.radio.joules(sent_bytes, received_bytes), worked)
        if use is not None:
            log.info("job %s/%s drew %s", job.run, job.assignment, described(use))
        self.conditions.worked(job.bundle.sha256, steps, worked.train_s, use)
        return use

    def _on_failed(self, reason: str) -> None:
        key = self.state.running
        energy = self._energy_used(0)
        if key is not None and not self.files.holds_base(self.state.jobs[key].job):  # the worker found it damaged
            log.warning("job %s/%s: %s", *key, reason)
            self._step(events.ModelLost(self.loop.now(), energy))
        else:
            self._step(events.TrainingFailed(self.loop.now(), reason, energy))

    def _on_trained(self, done: pipe.Trained) -> None:
        now, meta = self.loop.now(), done.meta
        worked = Worked(done.train_s, done.compress_s, done.train_cpu_s, done.compress_cpu_s)
        energy = self._energy_used(done.size_bytes, worked, meta.steps)
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
                path, sha256 = self.files.empty_update()
            except OSError as error:
                self._step(events.TrainingFailed(now, str(storage_error(self.spool.folder, error)), energy))
                return
        chunk_bytes = self.link.chunk_bytes if self.link.is_up else CHUNK_BYTES
        blob = messages.BlobRef(sha256=sha256, size_bytes=done.size_bytes, chunk_bytes=chunk_bytes)
        self._step(events.Trained(now, Path(path).name, blob, meta, done.key, change))
        self.models.prune_runs(self.spool.runs() | {name for name, _ in self.state.jobs})

    def _on_worker_end(self, reason: str, ours: bool) -> None:
        if self.state.running is not None:
            try:
                self.spool.drop_unfinished(*self.state.running)
            except (OSError, StorageError) as error:
                log.warning("%s: cannot be cleaned (%s)", self.spool.folder, error)
        self._step(events.WorkerCrashed(self.loop.now(), reason, ours, self._energy_used(0)))

    # Limits

    def _tick(self) -> None:
        now = self.loop.now()
        self.joules.tick()
        self.conditions.tick(self.link, could=self.link.is_up and not self.state.paused)
        if self._watches:
            self._check_limits()
        if self.link.is_up and now >= self._next_heartbeat_s:
            self._send_heartbeat()
        if self.link.is_up and now >= self._next_announcement_s and is_news(self._announced, self._figures()):
            self._announce()
        self._step(events.Tick(now))
        self.loop.call_later(TICK_S, self._tick)

    def _tell_unknown(self) -> None:
        from edge_runtime.agent.limit_facts import unknown_facts

        before, self._unknown = (
            self._unknown,
            unknown_facts(self.conditions.known({}), self.config.limits, self.config.telemetry.file),
        )
        for line in self._unknown:
            if line not in before:
                log.warning("%s", line)

    def _check_limits(self) -> None:
        found = self.conditions.held()
        paused, hurries = bool(self.state.paused), found is not None and not found.keeps_work
        if (found is not None) != paused or (hurries and not self._hurries):  # figures in reasons change all the time
            log.warning("training paused: %s", found.reason) if found else log.info("training may run again")
            told = events.Paused(self.loop.now(), "") if found is None else _pause(self.loop.now(), found)
            self._step(told)
            if self.link.is_up and self.conditions.told_anew():
                self._send_heartbeat()  # who selects need not wait for what a script has just said
        self._hurries = hurries


def _pause(now: float, found: limits.Decline) -> events.Paused:
    return events.Paused(now, found.reason, found.keeps_work, found.for_s)


def _instance(folder: Path) -> str:
    """A random name of this installation, made once."""
    path = folder / "instance"
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    name = os.urandom(8).hex()
    write_durably(path, name.encode())
    return name
