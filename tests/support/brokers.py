"""Brokers, loops and links for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING

from edge_runtime.transport.link import Link, LinkSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edge_runtime.transport.loop import Loop

HOST = "127.0.0.1"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class OwnMosquitto:
    """mosquitto with lines of configuration of the test's own, on one port through kills and restarts."""

    def __init__(self, program: str, folder: Path, lines: list[str], port: int | None = None) -> None:
        self.program, self.folder, self.port = program, folder, port or free_port()
        self.config = folder / f"mosquitto-{self.port}.conf"
        self.log = folder / f"mosquitto-{self.port}.log"
        always = [
            "set_tcp_nodelay true",
            "max_queued_messages 0",
            "persistence false",
            "log_dest stderr",
            "log_type all",
        ]
        text = [f"listener {self.port} {HOST}", *lines, *always, *(["user root"] if os.getuid() == 0 else [])]
        self.config.write_text("\n".join(text) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Without TLS."""
        return f"mqtt://{HOST}:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([self.program, "-c", str(self.config)], stdout=log, stderr=log)
        for _ in range(500):
            assert self.process.poll() is None, self.log.read_text()
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def own_mosquitto(program: str, folder: Path, *lines: str, start: bool = True) -> Iterator[OwnMosquitto]:
    """A mosquitto of the test's own that is gone afterwards."""
    broker = OwnMosquitto(program, folder, list(lines) or ["allow_anonymous true"])
    if start:
        broker.start()
    try:
        yield broker
    finally:
        broker.kill()


def run_until(loop: Loop, condition: Callable[[], object], timeout_s: float = 20.0, what: str = "") -> None:
    """Steps a loop until something is true; the limit is only for tests that fail."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s in vain {what}"
        loop.step(0.05)


class Peer:
    """A link with a record of what happened to it."""

    def __init__(self, loop: Loop, url: str, name: str = "dev", topics: tuple[str, ...] = ("t/#",), **options) -> None:
        self.loop, self.name = loop, name
        self.got: list[tuple[str, bytes]] = []
        self.ups = 0
        self.downs: list[str] = []
        self.handler: Callable[[str, bytes], None] = lambda topic, payload: self.got.append((topic, payload))
        self.when_up: Callable[[], None] = lambda: None
        self.when_down: Callable[[], None] = lambda: None
        will = options.pop("will", None)
        settings = {"backoff_first_s": 0.05, "backoff_limit_s": 0.3, "client_id": name} | options
        self.link = Link(
            LinkSettings(url=url, **settings),
            loop,
            topics=list(topics),
            on_message=lambda topic, payload: self.handler(topic, payload),  # noqa: PLW0108 - tests replace it
            on_up=self._up,
            on_down=self._down,
            random=Random(name),
            will=will,
        )

    def _up(self) -> None:
        self.ups += 1
        self.when_up()

    def _down(self, reason: str) -> None:
        self.downs.append(reason)
        self.when_down()

    def up(self) -> Peer:
        """Starts and waits until it is up."""
        ups = self.ups
        self.link.start()
        run_until(self.loop, lambda: self.ups > ups, what=f"for {self.name}: {self.downs[-3:]}")
        return self
