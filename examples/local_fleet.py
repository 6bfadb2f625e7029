"""A coordinator with its broker and any number of agents as processes on this machine.

For demonstrations and benchmarks; a production fleet starts the same programs by hand or by systemd.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from coordinator.report import run_summary
from coordinator.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

AGENT = """device = "{device}"
state_dir = "state"

[broker]
url = "{url}"
username = "edge"
password_file = "{password_file}"
protocol = "{protocol}"

# A sensor would measure this whole machine once for every agent; so each agent models what its own CPU time adds to
# the power of an idle machine, with nominal watts of a small board, and a radio that this machine may not have.
[energy]
sensor = "modelled"
modelled_of = "agent"
idle_watts = 2.5
busy_watts = 7.0
radio = "wifi"

[[data]]
name = "{dataset}"
path = "{dataset}.npz"
"""


class LocalFleet:
    """Processes that keep everything in ``folder``; :meth:`end` ends those it started, and only those."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.state = folder / "coordinator"
        self.connection: dict[str, str] = {}

    def end(self) -> None:
        """Ends the processes, the last started first."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Starts one of our programs with its output in ``logs/NAME.log``."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.processes.append(process)
        return process

    def start_coordinator(self) -> dict[str, str]:
        """Starts broker and coordinator and gives the connection for agents."""
        process = self.start("coordinator", "coordinator.cli", "serve", "--state", str(self.state))
        connection = self.state / "connection.json"
        end = time.monotonic() + 30
        while not connection.exists():
            if process.poll() is not None or time.monotonic() > end:
                text = (self.folder / "logs" / "coordinator.log").read_text(errors="replace")
                raise SystemExit(f"the coordinator did not start:\n{text}")
            time.sleep(0.05)
        self.connection = json.loads(connection.read_text())
        return self.connection

    def start_agent(self, device: str, dataset: str, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Gives an agent its own data and starts it."""
        folder = self.folder / "devices" / device
        folder.mkdir(parents=True)
        np.savez(folder / f"{dataset}.npz", x=x, y=y)
        (folder / "agent.toml").write_text(AGENT.format(device=device, dataset=dataset, **self.connection))
        self.start(device, "edge_runtime.cli", "run", "--config", str(folder / "agent.toml"))

    def command(self, *arguments: str) -> Any:
        """Runs ``edge-coordinator ... --json`` and gives what it prints."""
        command = [sys.executable, "-m", "coordinator.cli", *arguments, "--state", str(self.state), "--json"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"edge-coordinator {arguments[0]} failed: {result.stderr.strip()}")
        return json.loads(result.stdout)

    def follow(self, run: str, timeout_s: float, on_round: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Calls ``on_round`` with every round as it closes and gives the summary when the run has ended."""
        store = Store(self.state, create=False)
        end, shown = time.monotonic() + timeout_s, 0
        try:
            while True:
                summary = run_summary(store, run)
                ended = summary["status"] != "running"
                # The last round stays open to its evaluation until the run ends, others get theirs a moment later.
                ready = [entry for entry in summary["history"] if ended or entry["version"] < summary["version"]]
                for entry in ready[shown:]:
                    on_round(entry)
                shown = len(ready)
                if ended:
                    return summary
                if time.monotonic() > end:
                    raise SystemExit(f"run {run} did not end within {timeout_s:g} s; see {self.folder / 'logs'}")
                time.sleep(0.1)
        finally:
            store.close()
