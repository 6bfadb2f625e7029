"""Accuracy against bytes on Fashion-MNIST: codecs with error feedback, both directions, beside uncompressed training.

    python -m benchmarks.accuracy_vs_bytes --model cnn --devices 10 --alpha 0.3 --rounds 15 --seeds 3

All devices train every round, one epoch on their share of 4,000 images; the test is on all 10,000 test images, the
accuracy is the mean over the last three rounds. The learning rate is chosen for uncompressed training from a grid, on
the first seed, and used with every codec, as are the schedule and the server's optimiser; seeds are paired. Models move
by what was decoded from the bytes. Bytes are those of the MQTT packets of jobs, models, requests, updates, receipts and
verdicts, and their acknowledgements: topics, messages and headers included. The bundle, which every device fetches
once, is not among them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.fashion import MODELS, Task, load
from benchmarks.report import parser, print_report
from benchmarks.wire import Wire
from coordinator.aggregation.optimizers.momentum import Momentum
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import CodecSpec, decode, encode
from edge_runtime.messages import UpdateId

if TYPE_CHECKING:
    import argparse

    from edge_runtime.compression.base import State, Update, Value, Vector

LAST_ROUNDS = 3
DEFAULT_CODECS = [
    "default",
    "default-up",
    "default-double",
    "sparse",
    "topk",
    "stc",
    "int8",
    "eden",
    "fedzip",
    "fedzip-feedback",
]
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # two-sided Student t, by degrees of freedom


class Setting(NamedTuple):
    """One way to compress: codec, options and bytes ratio of either direction; no ratio leaves it to the codec."""

    name: str
    up: str
    up_options: dict[str, Value]
    up_ratio: float | None
    down: str = "raw"
    down_ratio: float | None = None


class Outcome(NamedTuple):
    """What one run of one seed gave; bytes are of all devices and rounds."""

    accuracy: float  # of the coordinator's model
    accuracy_on_devices: float  # of the model that devices hold, which a lossy downlink makes another one
    bytes_up: int
    bytes_down: int
    encode_cpu_s: float
    updates: int
    raw_bytes: int  # of as many float32 vectors


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """What is compared, by name; ``fp32`` is always there."""
    up, down = options.ratio_up, options.ratio_down
    density = options.density
    known = {
        "fp32": Setting("fp32", "raw", {}, None),
        "default": Setting("default", "default", {}, up, "default", down),
        "default-up": Setting("default-up", "default", {}, up),
        "default-double": Setting("default-double", "default", {}, 2 * up, "default", down),
        "lowrank": Setting("lowrank", "lowrank", {}, up),
        "sparse": Setting("sparse", "sparse", {}, up),
        "topk": Setting("topk", "topk", {"density": density}, None),
        "stc": Setting("stc", "stc", {"density": density}, None),
        "int8": Setting("int8", "int8", {}, None),
        "int4": Setting("int4", "int4", {}, None),
        "eden": Setting("eden", "eden", {}, None),
        "sign": Setting("sign", "sign", {}, None),
        "powersgd": Setting("powersgd", "powersgd", {}, None),
        "fedzip": Setting("fedzip", "fedzip", {}, None),
        "fedzip-feedback": Setting("fedzip-feedback", "fedzip", {"error_feedback": True}, None),
    }
    unknown = set(options.codecs) - set(known)
    if unknown:
        raise SystemExit(f"unknown codec {min(unknown)!r}; known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(["fp32", *options.codecs])]


class FederatedRun:
    """One run of one seed with one setting; every update is decoded from its bytes before it counts."""

    def __init__(self, task: Task, setting: Setting, options: argparse.Namespace, lr: float) -> None:
        self._task, self._setting, self._options, self._lr = task, setting, options, lr
        self._layout = task.layout
        self._samples = [len(view.train) for view in task.views]
        self._wire = Wire(task.layout, options.model, len(task.views))
        self._spec = CodecSpec(setting.up, setting.up_options)
        self._states: list[State] = [{} for _ in task.views]
        self._server: Vector = task.initial
        self._shared = None if setting.down == "raw" else SharedModel.start(task.initial, task.layout)
        self._encode_cpu_s = 0.0

    def run(self) -> Outcome:
        """All rounds."""
        options = self._options
        server: list[float] = []
        devices: list[float] = []
        optimizer = Momentum({"momentum": options.server_momentum})
        state = optimizer.init(self._layout.size)
        for round_ in range(options.rounds):
            change = np.zeros(self._layout.size, np.float64)
            for device, samples in enumerate(self._samples):
                self._update(round_, device).add_to(change, samples / sum(self._samples))
            self._server, state, _ = optimizer.apply(self._server, change, state)
            self._publish(round_)
            if round_ >= options.rounds - LAST_ROUNDS:
                server.append(self._task.evaluate(self._server))
                devices.append(server[-1] if self._shared is None else self._task.evaluate(self._shared.vector))
        updates = len(self._samples) * options.rounds
        raw_bytes = 4 * self._layout.size * updates
        wire = self._wire
        return Outcome(
            accuracy=statistics.mean(server),
            accuracy_on_devices=statistics.mean(devices),
            bytes_up=wire.bytes_up,
            bytes_down=wire.bytes_down,
            encode_cpu_s=self._encode_cpu_s,
            updates=updates,
            raw_bytes=raw_bytes,
        )

    def _update(self, round_: int, device: int) -> Update:
        options, layouts = self._options, {"delta": self._layout}
        held = self._server if self._shared is None else self._shared.vector
        lr = self._lr * options.lr_decay ** (round_ / max(1, options.rounds - 1))
        delta = self._task.train(device, held, round_, lr) - held
        name = UpdateId(options.model, self._wire.device(device), self._wire.assignment(round_, device), 0)
        began = time.process_time()
        encoded = encode(
            self._spec,
            {"delta": delta},
            layouts,
            self._states[device],
            budget_bytes=self._budget(device),
            seed=round_ * 1009 + device,
            base_version=round_,
            tag=update_tag(name),
            reference=held,
        )
        self._encode_cpu_s += time.process_time() - began
        self._states[device] = encoded.state
        self._wire.update(name, encoded.data, round_, self._samples[device])
        return decode(encoded.data, layouts, base_version=round_, tag=update_tag(name), reference=held)["delta"]

    def _budget(self, device: int) -> int | None:
        """Bytes of one update, so that all packets together come to the ratio."""
        ratio, samples = self._setting.up_ratio, self._samples
        if ratio is None:
            return None
        size = 4 * self._layout.size
        request = self._wire.request_bytes(size if self._shared is None else self._wire.change_bytes)
        mean = size / ratio - self._wire.envelope_bytes - request
        share = samples[device] * len(samples) / sum(samples) if self._options.by_samples else 1.0
        return max(64, math.floor(mean * share))

    def _publish(self, round_: int) -> None:
        """Counts what this round sent down, and moves the shared model on by the decoded change."""
        layouts, wire = {"model": self._layout}, self._wire
        size = 4 * self._layout.size
        wire.model(round_, size if self._shared is None else wire.change_bytes, len(self._samples))
        if self._shared is None:
            return
        ratio = self._setting.down_ratio
        change = encode(
            CodecSpec(self._setting.down, {"error_feedback": False}),
            {"model": self._server - self._shared.vector},
            layouts,
            budget_bytes=None if ratio is None else int(size / ratio - wire.job_bytes),
            base_version=round_,
            reference=self._shared.vector,
        )
        wire.change_bytes = len(change.data)
        decoded = decode(change.data, layouts, reference=self._shared.vector)["model"]
        self._shared = self._shared.plus(decoded.vector())


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    settings = settings_of(options)
    seeds = list(range(options.seeds))
    with multiprocessing.get_context("spawn").Pool(options.processes, _prepare, (options,)) as pool:
        grid = pool.starmap(_one, [(0, settings[0], lr) for lr in options.lr_grid])
        rates = {lr: outcome.accuracy for lr, outcome in zip(options.lr_grid, grid, strict=True)}
        print(
            f"fp32 by learning rate, seed 0: { ({lr: round(value, 4) for lr, value in rates.items()}) }",
            file=sys.stderr,
        )
        lr = max(rates, key=lambda rate: rates[rate])
        tasks = [(seed, setting, lr) for seed in seeds for setting in settings]
        outcomes = dict(zip([(s, t.name) for s, t, _ in tasks], pool.starmap(_one, tasks, chunksize=1), strict=True))
    results = [
        _row(setting, [outcomes[seed, setting.name] for seed in seeds], [outcomes[seed, "fp32"] for seed in seeds])
        for setting in settings
    ]
    for result in results:
        result["lr"], result["lr_grid_accuracy"] = lr, {str(key): round(value, 4) for key, value in rates.items()}
    print_report("accuracy_vs_bytes", options, results)
    return 0


def _row(setting: Setting, runs: list[Outcome], fp32: list[Outcome]) -> dict[str, Any]:
    differences = [100 * (run.accuracy - base.accuracy) for run, base in zip(runs, fp32, strict=True)]
    mean = statistics.mean(differences)
    half = None
    if len(runs) > 1:
        half = T_95.get(len(runs) - 1, 2.0) * statistics.stdev(differences) / math.sqrt(len(runs))
    return {
        "codec": setting.name,
        "options_up": dict(setting.up_options),
        "codec_down": setting.down,
        "accuracy": round(statistics.mean(run.accuracy for run in runs), 4),
        "accuracy_on_devices": round(statistics.mean(run.accuracy_on_devices for run in runs), 4),
        "accuracy_fp32": round(statistics.mean(run.accuracy for run in fp32), 4),
        "difference_points": round(mean, 2),
        "difference_interval": None if half is None else [round(mean - half, 2), round(mean + half, 2)],
        "difference_by_seed": [round(value, 2) for value in differences],
        "bytes_up": sum(run.bytes_up for run in runs) // len(runs),
        "bytes_down": sum(run.bytes_down for run in runs) // len(runs),
        "ratio_up": round(sum(run.raw_bytes for run in runs) / sum(run.bytes_up for run in runs), 1),
        "ratio_down": round(sum(run.raw_bytes for run in runs) / sum(run.bytes_down for run in runs), 1),
        "encode_cpu_ms": round(1000 * sum(run.encode_cpu_s for run in runs) / sum(run.updates for run in runs), 1),
    }


_process: dict[str, Any] = {}


def _prepare(options: argparse.Namespace) -> None:
    _process["options"], _process["data"], _process["tasks"] = options, load(options.data), {}


def _one(seed: int, setting: Setting, lr: float) -> Outcome:
    options, tasks = _process["options"], _process["tasks"]
    if seed not in tasks:
        tasks.clear()
        tasks[seed] = Task(
            _process["data"],
            options.model,
            seed=seed,
            devices=options.devices,
            alpha=options.alpha,
            images=options.images,
            batch_size=options.batch_size,
        )
    outcome = FederatedRun(tasks[seed], setting, options, lr).run()
    print(f"{options.model} seed {seed} lr {lr} {setting.name}: {outcome}", file=sys.stderr, flush=True)
    return outcome


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--model", choices=MODELS, default="cnn")
    result.add_argument("--devices", type=int, default=10)
    result.add_argument("--alpha", type=float, default=0.3, help="label skew (Dirichlet)")
    result.add_argument("--rounds", type=int, default=15)
    result.add_argument("--seeds", type=int, default=3)
    result.add_argument("--images", type=int, default=4000, help="training images of all devices together")
    result.add_argument("--batch-size", type=int, default=32)
    result.add_argument("--codecs", nargs="+", default=DEFAULT_CODECS)
    result.add_argument("--ratio-up", type=float, default=1090.0, help="of codecs with rate control")
    result.add_argument("--ratio-down", type=float, default=101.0, help="of the compressed downlink")
    result.add_argument("--density", type=float, default=0.01, help="of codecs without rate control")
    result.add_argument("--by-samples", action="store_true", help="bytes in proportion to a device's images")
    result.add_argument("--lr-grid", type=float, nargs="+", default=[0.1, 0.15, 0.2])
    result.add_argument("--lr-decay", type=float, default=0.1, help="last learning rate over the first")
    result.add_argument("--server-momentum", type=float, default=0.0)
    result.add_argument("--processes", type=int, default=2)
    return result


if __name__ == "__main__":
    sys.exit(main())
