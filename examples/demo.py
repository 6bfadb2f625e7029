"""The demonstration: eight agents with different shares of handwritten digits train one model over MQTT.

``scripts/demo`` runs it. A broker, a coordinator and eight ``edge-agent`` processes start on this machine, every agent
gets a non-IID share of the digits that scikit-learn carries, and the model is trained without any share leaving its
agent. At the end ``runs/<id>/summary.json`` holds the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
TEST_SHARE = 0.2
DIRICHLET_ALPHA = 0.5  # 0.5: most devices see three or four of the ten digits
PLAN = """name = "digits"
bundle = "{bundle}"
dataset = "digits"
rounds = {rounds}
seed = {seed}
codec = "zstd"
test_set = "test.npz"

[participation]
target = {target}
minimum = 2
over_commit = 1.25
deadline_s = 30.0

[training]
epochs = 2
batch_size = 16
holdout_fraction = 0.1
hyper = {{ lr = 0.05, momentum = 0.9 }}
"""
AGENT = """device = "{device}"
state_dir = "state"

[broker]
url = "{url}"
username = "edge"
password_file = "{password_file}"
protocol = "{protocol}"

[[data]]
name = "digits"
path = "digits.npz"
"""


def load_digits(seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Images float32 ``[n, 1, 8, 8]`` (0 to 16) and labels int64 ``[n]``: for training, and a test set apart."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    x = digits.images[:, None].astype(np.float32)
    y = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(y))
    held = int(len(y) * TEST_SHARE)
    test, train = order[:held], order[held:]
    return x[train], y[train], x[test], y[test]


def shares(labels: NDArray[Any], devices: int, seed: int) -> list[NDArray[Any]]:
    """Row numbers per device; the mix of labels follows a Dirichlet distribution, every device gets at least 20."""
    random = np.random.default_rng(seed)
    while True:
        parts: list[list[int]] = [[] for _ in range(devices)]
        for label in np.unique(labels):
            rows = random.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(random.dirichlet([DIRICHLET_ALPHA] * devices))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        if min(len(part) for part in parts) >= 20:
            return [np.array(sorted(part)) for part in parts]


class Demo:
    """The processes of one demonstration; :meth:`end` ends those it started, and only those."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.state = folder / "coordinator"

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
        described: dict[str, str] = json.loads(connection.read_text())
        return described

    def start_agent(self, device: str, connection: dict[str, str], x: NDArray[Any], y: NDArray[Any]) -> None:
        """Gives an agent its share and starts it."""
        folder = self.folder / "devices" / device
        folder.mkdir(parents=True)
        np.savez(folder / "digits.npz", x=x, y=y)
        (folder / "agent.toml").write_text(AGENT.format(device=device, **connection))
        self.start(device, "edge_runtime.cli", "run", "--config", str(folder / "agent.toml"))

    def command(self, *arguments: str) -> Any:
        """Runs ``edge-coordinator ... --json`` and gives what it prints."""
        command = [sys.executable, "-m", "coordinator.cli", *arguments, "--state", str(self.state), "--json"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"edge-coordinator {arguments[0]} failed: {result.stderr.strip()}")
        return json.loads(result.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; 0 if the run finished."""
    options = _parser().parse_args(arguments)
    folder = options.runs / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    x, y, test_x, test_y = load_digits(options.seed)
    np.savez(folder / "test.npz", x=test_x, y=test_y)
    shutil.copy(HERE / "digits.bundle", folder / "digits.bundle")
    target = max(2, options.devices - 2)
    plan = PLAN.format(bundle="digits.bundle", rounds=options.rounds, seed=options.seed, target=target)
    (folder / "plan.toml").write_text(plan)
    parts = shares(y, options.devices, options.seed)
    _say(f"{len(y)} training digits on {options.devices} devices, {len(test_y)} test digits that no device holds")
    started = time.monotonic()
    demo = Demo(folder)
    try:
        connection = demo.start_coordinator()
        _say(f"broker {connection['broker']} at {connection['url']}")
        for number, rows in enumerate(parts):
            device = f"device-{number:02d}"
            demo.start_agent(device, connection, x[rows], y[rows])
            mix = ", ".join(
                f"{label}:{count}" for label, count in enumerate(np.bincount(y[rows], minlength=10)) if count
            )
            _say(f"  {device}  {len(rows):4d} digits  {mix}")
        run = demo.command("submit", str(folder / "plan.toml"))["run"]
        summary = _follow(demo, run, options.timeout_s)
        demo.command("model", run, "-o", str(folder / "model.onnx"))
    finally:
        demo.end()
    summary["wall_s"] = round(time.monotonic() - started, 2)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _table(summary)
    _say(f"\nsummary: {folder / 'summary.json'}\nmodel:   {folder / 'model.onnx'}\nlogs:    {folder / 'logs'}")
    return 0 if summary["status"] == "finished" else 1


def _follow(demo: Demo, run: str, timeout_s: float) -> dict[str, Any]:
    """Prints every round as it closes, until the run has ended."""
    from coordinator.store import Store
    from coordinator.summary import run_summary

    store = Store(demo.state, create=False)
    end, shown = time.monotonic() + timeout_s, 0
    while True:
        summary: dict[str, Any] = run_summary(store, run)
        for entry in store.rounds(run)[shown:]:
            shown += 1
            accuracy = (
                entry.test.correct / entry.test.samples if entry.test and entry.test.correct is not None else None
            )
            known = "" if accuracy is None else f"accuracy {accuracy:6.1%}  "
            _say(
                f"  round {entry.round + 1:3d}  {known}updates {entry.updates + entry.late_updates:2d}  "
                f"up {entry.bytes_up / 1e3:7.1f} kB  down {entry.bytes_down / 1e3:7.1f} kB  "
                f"{entry.closed_unix_s - entry.opened_unix_s:5.2f} s"
            )
        if summary["status"] != "running":
            store.close()
            return summary
        if time.monotonic() > end:
            raise SystemExit(f"the run did not end within {timeout_s:g} s; see {demo.folder / 'logs'}")
        time.sleep(0.1)


def _table(summary: dict[str, Any]) -> None:
    _say("")
    for key in (
        "run",
        "status",
        "accuracy",
        "rounds",
        "devices",
        "updates_counted",
        "bytes_up",
        "bytes_down",
        "seconds",
    ):
        if key in summary:
            value = summary[key]
            _say(f"  {key:16s} {value:.4f}" if isinstance(value, float) else f"  {key:16s} {value}")


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Eight agents train on handwritten digits.")
    parser.add_argument("--devices", type=int, default=8, help="how many agents (default 8)")
    parser.add_argument("--rounds", type=int, default=12, help="how many rounds (default 12)")
    parser.add_argument("--seed", type=int, default=1, help="of the shares and the run (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where results go (default ./runs)")
    parser.add_argument("--timeout-s", type=float, default=80.0, help="give up after so many seconds (default 80)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
