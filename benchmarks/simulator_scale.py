"""The simulator at scale: device-rounds per second, memory, and what one selection costs.

    python -m benchmarks.simulator_scale --devices 1000,10000,100000

LeNet-5 (61,706 parameters), raw float32 both ways, synthetic traces, ``energy_aware``. Mode ``no_training``: updates
are echoes, encoded, hashed, decoded and summed like real ones. Mode ``training``: every job is one batch of ten
images through the device's trainer, in ``--processes`` processes. A device-round is a job that a virtual device
finished; setting up the fleet is not in the time, and told beside it, as is the CPU time of all. ``rss_mb`` is the
peak of the process, and of each worker, added up. ``selector_ms`` is the CPU time of one selection of
``energy_aware`` among so many candidates that all had a heartbeat, median of eleven. Each result is from a fresh
process. Flower's Ray simulation of a 60k-parameter echo reached 81 client-rounds a second on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

from benchmarks.report import MB, parser, print_report

if TYPE_CHECKING:
    from coordinator.plan import Plan

FLOWER_PER_S = 81.0
MODES = ("no_training", "training")
PEAK_PER_S = {"no_training": 10 * FLOWER_PER_S, "training": 5 * FLOWER_PER_S}
LARGEST_RSS_MB, LARGEST_SELECTOR_MS = 4000.0, 20.0
SELECTOR_DEVICES = 10_000  # up to which that holds
BATCH_SIZE = 10
SAMPLES = 20_000  # shared out among the devices, or one each if they are more
SELECTIONS = 11


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    if options.one is not None:
        print(json.dumps(measure(int(options.devices), options.one, options)))
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "lenet.bundle"
        export(bundle)
        for count in options.devices.split(","):
            for mode in options.modes.split(","):
                command = [sys.executable, "-m", "benchmarks.simulator_scale", "--one", mode, "--devices", count]
                command += ["--bundle", str(bundle), "--processes", str(options.processes)]
                command += ["--rounds", str(options.rounds)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                say(results[-1])
    print_report("simulator_scale", options, results)
    return 0


def say(result: dict[str, Any]) -> None:
    """Prints a result beside its targets."""
    wanted, rate, rss = PEAK_PER_S[result["mode"]], result["device_rounds_per_s"], result["rss_mb"]
    parts = [
        f"{result['devices']} devices, {result['mode']}: {rate} device-rounds/s (>= {wanted:g}: {met(rate >= wanted)})",
        f"{rss} MB (<= {LARGEST_RSS_MB:g}: {met(rss <= LARGEST_RSS_MB)})",
        f"selection {result['selector_ms']} ms",
    ]
    if result["devices"] <= SELECTOR_DEVICES:
        parts[-1] += f" (<= {LARGEST_SELECTOR_MS:g}: {met(result['selector_ms'] <= LARGEST_SELECTOR_MS)})"
    print(", ".join(parts), file=sys.stderr, flush=True)


def met(yes: bool) -> str:
    """In words."""
    return "met" if yes else "missed"


def measure(devices: int, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """One result, in this process."""
    from coordinator.executors import open_executor
    from coordinator.simulation.running import simulate
    from coordinator.simulation.settings import Settings
    from coordinator.simulation.synthetic import synthetic

    target = min(1000, devices // 10)
    plan = plan_of(options.bundle, target=target, rounds=options.rounds)
    began, cpu = time.perf_counter(), cpu_s()
    traces = synthetic(devices, 0)
    shares = shares_of(devices) if mode == "training" else None
    executor = open_executor(options.processes) if mode == "training" else None
    try:
        report = simulate(plan, traces, Settings(step_s=1.0, limit_s=86_400.0), shares=shares, executor=executor)
        peak = sum(peak_mb(process) for process in (psutil.Process(), *psutil.Process().children(recursive=True)))
    finally:
        if executor is not None:
            executor.close()
    whole, used = time.perf_counter() - began, cpu_s() - cpu
    return {
        "devices": devices,
        "mode": mode,
        "device_rounds_per_s": round(report.device_rounds_per_s, 1),
        "times_flower": round(report.device_rounds_per_s / FLOWER_PER_S, 2),
        "rss_mb": round(peak, 1),
        "selector_ms": selector_ms(devices, plan),
        "device_rounds": report.trained,
        "rounds": len(report.versions) - 1,
        "target": target,
        "virtual_s": round(report.virtual_s),
        "wall_s": round(report.wall_s, 2),
        "set_up_s": round(whole - report.wall_s, 2),
        "cpu_s": round(used, 2),
    }


def cpu_s() -> float:
    """CPU seconds of this process, and of its workers that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def peak_mb(process: psutil.Process) -> float:
    """The most memory that a process ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / MB


def export(path: Path) -> None:
    """Writes the bundle of LeNet-5."""
    import torch

    from benchmarks.fashion import lenet
    from exporters import export_bundle

    torch.manual_seed(0)
    torch.set_num_threads(1)
    export_bundle(lenet(), torch.randn(BATCH_SIZE, 1, 28, 28), path, name="lenet", parity=False)


def plan_of(bundle: Path, *, target: int, rounds: int) -> Plan:
    """A plan with one step of ten images a job."""
    import msgspec

    from coordinator.plan import Plan

    return msgspec.convert(
        {
            "name": "scale",
            "bundle": str(bundle),
            "dataset": "images",
            "rounds": rounds,
            "evaluate_on_devices": False,
            "uplink": {"codec": "raw"},
            "downlink": {"codec": "raw"},
            "participation": {
                "selector": "energy_aware",
                "selector_options": {"first_share": 1.0},  # all places of every round
                "target": target,
                "over_commit": 1.3,
                "attempts": 1000,
            },
            "training": {"steps": 1, "batch_size": BATCH_SIZE, "hyper": {"lr": 0.05, "momentum": 0.0}},
        },
        Plan,
    )


def shares_of(devices: int) -> Any:
    """Pixels of noise, as many samples for every device; what they show is no matter here."""
    from coordinator.simulation.data import Data, Shares

    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, 1, 28, 28)).astype(np.float32)
    each = max(SAMPLES // devices, BATCH_SIZE)
    starts = np.arange(devices + 1, dtype=np.int64) * each
    rows = np.arange(devices * each, dtype=np.int64) % SAMPLES  # a large fleet has samples in common
    return Shares(Data(x, random.integers(0, 10, SAMPLES)), rows, starts)


def selector_ms(devices: int, plan: Plan) -> float:
    """CPU milliseconds of one selection, the median."""
    from coordinator.fleet import Fleet
    from coordinator.scheduling import SELECTORS, RoundRequest
    from edge_runtime.heartbeat import heartbeat_of
    from edge_runtime.messages import DatasetInfo, DeviceState, Telemetry

    fleet, random = Fleet(), np.random.default_rng(0)
    names = [f"d{number:06}" for number in range(devices)]
    for name, percent, step_s in zip(
        names, random.uniform(10, 100, devices).tolist(), random.lognormal(0.0, 0.5, devices).tolist(), strict=True
    ):
        fleet.announce(
            0.0,
            DeviceState(
                device=name,
                online=True,
                session="s",
                instance=name,
                datasets=[DatasetInfo(name="images", samples=100)],
                battery_wh=20.0,
            ),
        )
        heartbeat = heartbeat_of(
            Telemetry(uptime_s=1.0, clock_unix_s=1.0, battery_percent=percent, on_external_power=False),
            reserve_percent=20.0,
            up_kbit_s=2000.0,
            down_kbit_s=8000.0,
            bundle_sha256="00" * 32,
            step_s=step_s,
            step_joules=5 * step_s,
        )
        fleet.measured(0.0, name, heartbeat)
    selector, taken = SELECTORS.create("energy_aware", {}), []
    for number in range(SELECTIONS):
        request = RoundRequest(
            run="scale-1",
            round_=number,
            attempt=0,
            count=130,
            candidates=names,
            plan=plan,
            random=Random(number),
            bundle=bytes(4),
            up_bytes=250_000,
            down_bytes=250_000,
        )
        began = time.process_time()
        selection = selector.select(float(number), fleet, request)
        taken.append(1000 * (time.process_time() - began))
        assert selection.choices
    return round(statistics.median(taken), 2)


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--devices", default="1000,10000,100000", help="comma-separated")
    result.add_argument("--modes", default=",".join(MODES), help="comma-separated")
    result.add_argument("--rounds", type=int, default=20)
    result.add_argument("--processes", type=int, default=2, help="that train")
    result.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    result.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    return result


if __name__ == "__main__":
    sys.exit(main())
