"""A fleet of real processes for tests: mosquitto, a coordinator and agents; each can be killed and restarted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from coordinator.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AGENT = """device = "{device}"
state_dir = "state"
[broker]
url = "{url}"
[[data]]
name = "numbers"
path = "numbers.npz"
"""


class Processes:
    """Starts everything in ``folder``; :meth:`close` ends what it started."""

    def __init__(self, folder: Path, mosquitto_program: str) -> None:
        self.folder = folder
        self.state = folder / "coordinator"
        self._mosquitto = mosquitto_program
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._commands: dict[str, list[str]] = {}
        self.running: dict[str, subprocess.Popen] = {}

    def start_broker(self) -> None:
        configuration = self.folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", "set_tcp_nodelay true", "log_dest none"]
        lines += ["user root"] if os.getuid() == 0 else []
        configuration.write_text("\n".join(lines) + "\n")
        self._start("broker", [self._mosquitto, "-c", str(configuration)])
        wait_until(lambda: _answers(self.port), 10, "mosquitto to listen")

    def start_coordinator(self, *options: str) -> None:
        command = ["coordinator.cli", "serve", "--state", str(self.state), "--broker", self.url, *options]
        self._start("coordinator", [sys.executable, "-m", *command])
        wait_until((self.state / "coordinator.db").exists, 20, "the coordinator's database")

    def start_agent(self, device: str, x: np.ndarray, y: np.ndarray, extra: str = "") -> None:
        home = self.folder / device
        home.mkdir()
        np.savez(home / "numbers.npz", x=x, y=y)
        (home / "agent.toml").write_text(AGENT.format(device=device, url=self.url) + extra)
        self._start(device, [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(home / "agent.toml")])

    def worker_of(self, device: str) -> psutil.Process | None:
        """The worker process of an agent, if it has one now."""
        try:
            children = psutil.Process(self.running[device].pid).children()
        except psutil.NoSuchProcess:
            return None
        return children[0] if children else None

    def kill(self, name: str) -> None:
        """SIGKILL, and the end of the process."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def restart(self, name: str) -> None:
        self._start(name, self._commands[name])

    def command(self, *arguments: str, check: bool = True) -> Any:
        """``edge-coordinator ARGUMENTS --json``: what it prints."""
        line = [sys.executable, "-m", "coordinator.cli", *arguments, "--state", str(self.state), "--json"]
        result = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert not check or result.returncode == 0, result.stderr
        return json.loads(result.stdout) if check else result

    def store(self) -> Store:
        return Store(self.state, create=False)

    def logs(self) -> str:
        """The last lines of every log, for a failing test to show."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(parts)

    def close(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name: str, command: list[str]) -> None:
        self._commands[name] = command
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )


def wait_until(condition: Callable[[], Any], limit_s: float, what: str, logs: Callable[[], str] = str) -> None:
    """Waits for a condition; fails, saying what for and showing logs, after ``limit_s`` seconds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s:g} s for {what}\n{logs()}"
        time.sleep(0.05)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
