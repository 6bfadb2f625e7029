"""The embedded broker: mosquitto as a child process where it is installed, else amqtt in this process.

For demonstrations and tests on one machine: it listens on loopback only and takes one user with a random password
that is new at every start. A fleet uses a broker of its own, named by URL.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from edge_runtime.errors import TransportError
from edge_runtime.files import write_durably
from edge_runtime.transport.link import PACKET_LIMIT_BYTES

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

log = logging.getLogger("edge.broker")

HOST = "127.0.0.1"
USERNAME = "edge"
START_TIMEOUT_S = 15.0
START_ATTEMPTS = 3
_PBKDF2_ITERATIONS = 101  # what mosquitto_passwd uses; the password has 256 bits of randomness
_PR_SET_PDEATHSIG = 1


class Broker(Protocol):
    """A running broker."""

    kind: str
    port: int

    def revive(self) -> None:
        """Starts it again if it has ended, on the same port and with the same password."""
        ...

    def stop(self) -> None:
        """Ends it."""
        ...


def start_broker(folder: Path, *, port: int = 0, prefer: str = "mosquitto") -> tuple[Broker, str]:
    """Starts a broker on loopback and gives it with its URL; the password lies in ``folder/broker-password``.

    Args:
        folder: for configuration and password; made if missing.
        port: 0 takes a free one.
        prefer: ``mosquitto`` falls back to amqtt where it is not on PATH (and says so in the log); ``amqtt`` takes
            amqtt.

    Raises:
        TransportError: neither can be started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    password = secrets.token_urlsafe(32)
    write_durably(password_file(folder), password.encode(), mode=0o600)
    program = mosquitto_path() if prefer == "mosquitto" else None
    for _ in range(START_ATTEMPTS - 1 if port == 0 else 0):
        try:
            return _start(program, folder, _free_port(), password)
        except TransportError as error:  # another process may have taken the port that was free just now
            log.info("%s; trying another port", error)
    return _start(program, folder, port or _free_port(), password)


def _start(program: str | None, folder: Path, port: int, password: str) -> tuple[Broker, str]:
    _check_port(port)
    log.info("embedded broker: %s on %s:%d", program or "amqtt", HOST, port)
    broker = AmqttBroker(port, password) if program is None else MosquittoBroker(program, folder, port, password)
    return broker, f"mqtt://{HOST}:{port}"


def password_file(folder: Path) -> Path:
    """Where the password of the embedded broker lies."""
    return folder / "broker-password"


def mosquitto_path() -> str | None:
    """The mosquitto program; Debian installs it where only root's PATH looks."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class MosquittoBroker:
    """mosquitto as a child process that dies with this one."""

    kind = "mosquitto"

    def __init__(self, program: str, folder: Path, port: int, password: str) -> None:
        self.port = port
        passwords, configuration = folder / "mosquitto.passwd", folder / "mosquitto.conf"
        write_durably(passwords, f"{USERNAME}:{_mosquitto_hash(password)}\n".encode(), mode=0o600)
        lines = [
            f"listener {port} {HOST}",
            "allow_anonymous false",
            f"password_file {passwords.resolve()}",
            "set_tcp_nodelay true",  # without it a round trip takes 90 ms
            "max_queued_messages 0",  # the default of 1000 silently drops chunks that were acknowledged
            "max_inflight_messages 0",
            f"max_packet_size {2 * PACKET_LIMIT_BYTES}",  # a larger packet would first fill the coordinator's memory
            "persistence false",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
        ]
        if os.getuid() == 0:
            lines.append("user root")  # else it could not read its password file
        write_durably(configuration, "\n".join(lines).encode() + b"\n", mode=0o600)
        self._log = (folder / "mosquitto.log").open("ab")
        self._command = [program, "-c", str(configuration)]
        self.process = self._start()
        try:
            _wait_for_port(port, self.process)
        except TransportError:
            self.stop()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            preexec_fn=functools.partial(_die_with_parent, ctypes.CDLL(None), os.getpid()),  # noqa: PLW1509
        )

    def revive(self) -> None:
        """Starts mosquitto again if it has ended; clients come back by themselves."""
        if self.process.poll() is not None:
            log.error("mosquitto ended (exit code %s), starting it again; see mosquitto.log", self.process.returncode)
            self.process = self._start()

    def stop(self) -> None:
        """Ends mosquitto."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


class AmqttBroker:
    """amqtt in a thread of this process: pure Python, speaks MQTT 3.1.1."""

    kind = "amqtt"

    def __init__(self, port: int, password: str) -> None:
        self.port = port
        self._password = password
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amqtt", daemon=True)
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S) or self._error is not None:
            raise TransportError(f"the embedded broker amqtt did not start ({self._error}); install mosquitto instead")

    def revive(self) -> None:
        """Lives and dies with this process."""

    def stop(self) -> None:
        """Ends the broker."""
        if self._loop is not None and self._stopped is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(timeout=5)

    def _run(self) -> None:
        import asyncio

        try:
            asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001 - whatever it is, the starter must hear of it
            self._error = error
            self._started.set()

    async def _serve(self) -> None:
        import asyncio

        from amqtt.broker import Broker as Amqtt

        logging.getLogger("amqtt").setLevel(logging.ERROR)
        logging.getLogger("transitions").setLevel(logging.ERROR)
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        # amqtt answers an MQTT 5 client by failing; the client then tries 3.1.1, so that is no news.
        self._loop.set_exception_handler(lambda _loop, context: log.debug("amqtt: %s", context.get("message")))
        configuration: dict[str, Any] = {
            "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{self.port}"}},
            "plugins": {"coordinator.broker_auth.PasswordPlugin": {"username": USERNAME, "password": self._password}},
        }
        broker = Amqtt(configuration)
        await broker.start()
        self._started.set()
        await self._stopped.wait()
        await broker.shutdown()


def _mosquitto_hash(password: str) -> str:
    salt = os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _PBKDF2_ITERATIONS)
    return f"$7${_PBKDF2_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def _die_with_parent(libc: ctypes.CDLL, parent: int) -> None:
    """Runs between fork and exec, where nothing may be loaded any more."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(port: int) -> None:
    """A broker that is already there would answer in the place of the one that then cannot start."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TransportError(f"port {port} cannot be used ({error.strerror}); choose another one, or 0") from error


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise TransportError(f"mosquitto ended at once (exit code {process.returncode}); see mosquitto.log beside")
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            if process.poll() is None:
                return
    raise TransportError(f"mosquitto does not answer on port {port}")
