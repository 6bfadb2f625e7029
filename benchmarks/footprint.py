"""What the device needs to train: install size, import time, memory and time per step, with torch beside it.

    python -m benchmarks.footprint

The install is made anew from this checkout in an empty virtual environment (the base dependencies are the device's).
Memory and time are of processes of their own: ours holds numpy, onnxruntime and the bundle and trains through the
device's trainer, torch's trains the same model eagerly. Steps of the two alternate in blocks, in CPU seconds, so that a
noisy machine hits both alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.device_install import ROOT, install
from benchmarks.report import parser, print_report

if TYPE_CHECKING:
    import argparse

MODELS = ("lenet", "resnet8")
BATCH_SIZE = 32


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        installed = {version: _install_mb(folder / version, version) for version in options.pythons}
        results = [measure(folder, model, options) for model in MODELS]
    for result in results:
        for version, size in installed.items():
            key = "install_mb" if version == options.pythons[0] else f"install_mb_python{version}"
            result[key] = size
    print_report("footprint", options, results)
    return 0


def measure(folder: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model: memory of fresh processes, then steps of both in turns."""
    bundle = folder / f"{model}.bundle"
    _run([sys.executable, "-m", "benchmarks.footprint_process", "export", model, str(bundle)])
    idle = _Talk("idle", str(bundle)).result
    ours = _Talk("ort", str(bundle))
    theirs = _Talk("torch", model)
    blocks: dict[str, list[float]] = {"ort": [], "torch": []}
    for _ in range(options.blocks):
        blocks["ort"].append(ours.block(options.steps))
        blocks["torch"].append(theirs.block(options.steps))
    return {
        "model": model,
        "batch_size": BATCH_SIZE,
        "threads": 1,
        "import_s": idle["import_s"],
        "idle_rss_mb": idle["rss_mb"],
        "train_peak_rss_mb": ours.end()["peak_rss_mb"],
        "torch_peak_rss_mb": theirs.end()["peak_rss_mb"],
        "ms_per_step": round(statistics.median(blocks["ort"]), 2),
        "torch_ms_per_step": round(statistics.median(blocks["torch"]), 2),
        "ms_per_step_min": round(min(blocks["ort"]), 2),
        "torch_ms_per_step_min": round(min(blocks["torch"]), 2),
    }


class _Talk:
    """A measuring process that answers one JSON line per request."""

    def __init__(self, kind: str, what: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.footprint_process", kind, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.result = self._read()

    def block(self, steps: int) -> float:
        """Median CPU milliseconds per step of one block."""
        self._write(str(steps))
        return float(self._read()["ms_per_step"])

    def end(self) -> dict[str, Any]:
        """Ends the process and gives its peak memory."""
        self._write("end")
        result = self._read()
        self._process.wait(timeout=30)
        return result

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"measuring process ended with exit code {self._process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result


def _install_mb(folder: Path, version: str) -> float | None:
    installed = install(folder, version)
    return None if installed is None else round(installed.size_mb, 1)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--steps", type=int, default=20, help="steps in a block")
    result.add_argument("--blocks", type=int, default=15, help="blocks of each")
    result.add_argument("--pythons", nargs="+", default=["3.11", "3.10"], help="the install is weighed with these")
    result.add_argument("--work", type=Path, default=None, help="folder for what is made meanwhile")
    return result


if __name__ == "__main__":
    sys.exit(main())
