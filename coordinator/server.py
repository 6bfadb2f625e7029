"""The coordinator as a process: MQTT, database and files around the pure round machine.

One thread runs the event loop; aggregation and evaluation run in one other thread, so that devices are answered
meanwhile. Command line and server share nothing but the database: a submitted run waits there until a server takes it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import ExitStack, closing, suppress
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

import edge_runtime
from coordinator.background import DISK_RETRY_S
from coordinator.device_news import DeviceNews
from coordinator.errors import StoreError
from coordinator.executors.local import LocalExecutor
from coordinator.fleet import Fleet
from coordinator.report import run_summary
from coordinator.run_shell import POLL_S, RunShell
from coordinator.settings import Connection, ServerSettings
from coordinator.store import HEARTBEAT_S, Store
from coordinator.submission import submit
from edge_runtime import messages, topics
from edge_runtime.errors import MessageError, StorageError
from edge_runtime.files import lock_folder, write_durably
from edge_runtime.heartbeat import from_telemetry
from edge_runtime.transport.link import Link
from edge_runtime.transport.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.plan import Plan

log = logging.getLogger("edge.coordinator")

DEVICE_SAVE_S = 1.0
DEVICE_SAVE_AGAIN_S = 0.1  # where many devices have news, so that their messages are handled in between
BROKER_CHECK_S = 1.0


class Coordinator:
    """Runs federated training for every submitted plan.

    Example:
        >>> from coordinator import Coordinator, ServerSettings  # doctest: +SKIP
        >>> Coordinator(ServerSettings(state_dir=Path("edge-state"))).run()  # doctest: +SKIP

    Raises:
        ConfigError: the settings cannot be used, or another coordinator runs on this state folder.
        TransportError: the embedded broker does not start.
        StorageError: the state folder cannot be used.
    """

    def __init__(
        self, settings: ServerSettings, *, loop: Loop | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        self.settings = settings
        self._owns_loop = loop is None
        self.loop = loop or Loop()
        self.clock = clock or steady_unix_clock()
        folder = settings.state_dir
        self._connection_file = folder / "connection.json"  # there while this server can be reached
        self.fleet = Fleet()
        self._session = os.urandom(8).hex()
        self._next_heartbeat_s = 0.0
        with ExitStack() as undo:
            lock = lock_folder(folder, "another coordinator runs on this state folder; stop it, or name another folder")
            undo.callback(os.close, lock)
            self.store = Store(folder, settings.database_url)
            undo.callback(self.store.close)
            self._news = DeviceNews(self.fleet, self.store.save)
            self.store.blobs.sweep()
            self._connection_file.unlink(missing_ok=True)
            self.connection = Connection(settings)
            undo.callback(self.connection.stop)
            self.link = self._make_link()
            executor = None
            if settings.workers:  # also a single one is a process of its own: this one answers devices
                executor = LocalExecutor(settings.workers)
                undo.callback(executor.close)
            self.shell = RunShell(self.store, self.fleet, self.loop, self.link, self.clock, executor=executor)
            self._made = undo.pop_all()

    def _make_link(self) -> Link:
        return Link(
            self.connection.link,
            self.loop,
            topics=[f"{topics.ROOT}/d/+/{leaf}" for leaf in ("state", "message", "chunk")],
            newest_only=[f"{topics.ROOT}/d/+/heartbeat"],
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=self._on_down,
            random=Random(self._session),
            will=(topics.COORDINATOR, lambda: self._announcement(online=False)),
        )

    def run(self) -> None:
        """Runs until :meth:`stop`."""
        self.start()
        try:
            self.loop.run()
        finally:
            self.close()

    def start(self) -> None:
        """Takes up the open runs and connects; the loop does the rest."""
        self.shell.start()
        self.link.start()
        self.loop.call_later(BROKER_CHECK_S, self._check_broker)
        self._save_devices()

    def stop(self) -> None:
        """Ends :meth:`run`; may be called from a signal handler or another thread. Runs go on at the next start."""
        self.loop.stop()

    def close(self) -> None:
        """Disconnects and frees everything."""
        self.link.stop((topics.COORDINATOR, self._announcement(online=False)))
        self.shell.close()
        with suppress(StoreError):  # then status finds out by itself, a little later
            self.store.server_gone(self.settings.name)
        self._connection_file.unlink(missing_ok=True)
        self._made.close()
        if self._owns_loop:
            self.loop.close()

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

    def _check_broker(self) -> None:
        """The embedded broker is ours to keep alive."""
        self.connection.revive_broker()
        self.loop.call_later(BROKER_CHECK_S, self._check_broker)

    def _tell_connection(self) -> None:
        way = self.connection.described()
        write_durably(self._connection_file, msgspec.json.encode(way))
        user = "" if way["username"] is None else f", user {way['username']}"
        secret = "" if way["password_file"] is None else f", password in {way['password_file']}"
        log.info("broker: %s%s%s (%s)", way["url"], user, secret, self._connection_file)

    def _on_up(self) -> None:
        if not self._connection_file.exists():
            self._tell_connection()
        self.link.publish(topics.COORDINATOR, self._announcement(online=True), retain=True)

    def _on_down(self, _reason: str) -> None:
        self.shell.on_down()
        for device in list(self.fleet.devices()):  # who is still there announces itself again
            self.fleet.gone(self.clock(), device.name)

    def _on_message(self, topic: str, payload: bytes) -> None:
        parsed = topics.parse_from_device(topic)
        if parsed is None:
            return
        device, leaf = parsed
        try:
            if leaf == "chunk":
                self.shell.uplink.on_chunk(device, payload)
            elif leaf == "heartbeat" and payload:
                self._heard_heartbeat(device, messages.decode_heartbeat(payload))
            elif payload:  # an empty retained message only clears its topic
                message = messages.decode_from_device(payload)
                self.shell.heard(device, message, len(payload))
                self._handle(device, message)
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
            case messages.Telemetry():  # of an agent that knows no heartbeats yet
                self._heard_heartbeat(device, from_telemetry(message))
            case messages.JobStatus():
                self.shell.on_job_failed(now, device, message)
            case messages.Pull():
                self.shell.on_pull(now, device, message)
            case messages.UpdateOffer():
                self.shell.on_offer(now, device, message)
            case messages.Need():
                self.shell.downlink.on_need(device, message)
            case messages.Gone():
                return  # the device will offer what it still has

    def _heard_heartbeat(self, device: str, heartbeat: messages.Heartbeat) -> None:
        known = self.fleet.get(device)
        first = known is not None and known.heartbeat is None
        self.fleet.measured(self.clock(), device, heartbeat)
        if first:
            self._news.changed(device)
        elif known is not None:
            self._news.beaten(device)

    def _announced(self, now: float, state: messages.DeviceState) -> None:
        before = self.fleet.get(state.device)
        conflict = "" if before is None else before.conflict
        was_online = before is not None and before.online
        joined = self.fleet.announce(now, state)
        self._news.changed(state.device)
        known = self.fleet.get(state.device)
        if known is not None and not known.online:  # not so for the last will of a connection already replaced
            if was_online:
                self._news.say(state.device, "left")
            self.shell.on_left(now, state.device)
        if joined:
            self._news.say(state.device, "joined")
            if known is not None and known.conflict and not conflict:
                log.error("%s", known.conflict)
            self.shell.on_joined(now, state.device)

    def _save_devices(self) -> None:
        """Stores what other processes may look at: the devices that have news, and that this server lives."""
        more = False
        try:
            more = self._news.save(self.loop.now())
            if self.loop.now() >= self._next_heartbeat_s:
                self.store.server_lives(self.settings.name, self.clock())
                self._next_heartbeat_s = self.loop.now() + HEARTBEAT_S
        except StoreError as error:
            log.error("%s; trying again in %g s", error, DISK_RETRY_S)  # noqa: TRY400 - one line for the operator
            self.loop.call_later(DISK_RETRY_S, self._save_devices)
            return
        if not more:
            self._news.sum_up()
        self.loop.call_later(DEVICE_SAVE_AGAIN_S if more else DEVICE_SAVE_S, self._save_devices)


def steady_unix_clock() -> Callable[[], float]:
    """Unix time that moves with the monotonic clock: a step of the system's clock neither stalls nor expires rounds."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


def serve(settings: ServerSettings) -> None:
    """Runs a coordinator in the foreground until SIGTERM or SIGINT; see :class:`Coordinator` for what it raises.

    ``connection.json`` in the state folder tells local agents how to reach the broker, once it can be reached.
    """
    server = Coordinator(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
