"""What a federated round costs beside training: time, CPU, bytes and memory of real processes.

    python -m benchmarks.round_overhead --devices 2 --parameters 60000 --rounds 30

mosquitto, ``edge-coordinator serve`` and ``edge-agent run`` (with its worker) as a user starts them; raw codec unless
``--codec`` names another, spool and fsync on both ends. Agents run from an environment with the device's dependencies
only. The model's parameters are perturbed instead of trained. A round lasts from its opening (the jobs are sent) to its
closing (the next model is on disk). Idle figures are taken after the run, when the lingering worker has ended, over a
window that holds keepalive and telemetry.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.device_install import install
from benchmarks.perturbing_bundle import write_perturbing_bundle
from benchmarks.report import parser, print_report
from benchmarks.testbed import Testbed, cpu_s, memory_mb
from coordinator.plan import Downlink, Participation, Plan, Training, Uplink
from coordinator.store import Store
from coordinator.submission import submit

if TYPE_CHECKING:
    import argparse

WARM_UP_ROUNDS = 3
LINGER_S = 5.0
AGENT = """device = "{device}"
state_dir = "state"
[broker]
url = "{url}"
insecure = true
[limits]
worker_linger_s = {linger_s}
[[data]]
name = "noise"
path = "noise.npz"
"""


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        result = measure(Path(folder), options)
    print_report("round_overhead", options, [result])
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run with warm-up, then an idle window."""
    device = install(folder / "device-environment", f"{sys.version_info.major}.{sys.version_info.minor}")
    assert device is not None, "the Python that runs this is here"
    bed = Testbed(folder, options.devices)
    try:
        broker = bed.start_broker()
        state = folder / "state"
        coordinator = bed.start_python(
            "coordinator", "hub", "coordinator.cli", "serve", "--state", str(state), "--broker", bed.url, "--insecure"
        )
        _wait_for(folder / "coordinator.log", "link up", 30)
        started = [_start_agent(bed, folder, number, device.python) for number in range(options.devices)]
        register_s = [
            _logged_at(folder / "coordinator.log", f"device-{number:03d} joined") - begun
            for number, begun in enumerate(started)
        ]
        agents = [bed.processes[f"device-{number:03d}"] for number in range(options.devices)]
        store = Store(state, create=False)
        write_perturbing_bundle(folder / "perturb.bundle", options.parameters)
        _finish(store, submit(store, _plan(folder, options, WARM_UP_ROUNDS)), 300)
        bytes_before = [bed.link_bytes(number) for number in range(options.devices)]
        cpu_before = cpu_s(coordinator), sum(cpu_s(agent) for agent in agents)
        run = submit(store, _plan(folder, options, options.rounds))
        _finish(store, run, 900)
        cpu_after = cpu_s(coordinator), sum(cpu_s(agent) for agent in agents)
        bytes_after = [bed.link_bytes(number) for number in range(options.devices)]
        peak_mb = max(_peak_mb(agent.pid) for agent in agents)
        coordinator_mb = memory_mb([coordinator])["rss_mb"]
        seconds = [row.closed_unix_s - row.opened_unix_s for row in store.rounds(run)]
        store.close()
        device_rounds = options.rounds * options.devices
        result: dict[str, Any] = {
            "devices": options.devices,
            "parameters": options.parameters,
            "rounds": options.rounds,
            "network": "namespaces, veth" if bed.isolated else "loopback",
            "seconds_per_round_median": round(statistics.median(seconds), 4),
            "seconds_per_round_min": round(min(seconds), 4),
            "seconds_per_round_max": round(max(seconds), 4),
            "payload_bytes": options.parameters * 4,
            "bytes_up_per_device_round": _per_round(bytes_before, bytes_after, 0, device_rounds),
            "bytes_down_per_device_round": _per_round(bytes_before, bytes_after, 1, device_rounds),
            "coordinator_cpu_s_per_round": round((cpu_after[0] - cpu_before[0]) / options.rounds, 4),
            "device_cpu_s_per_round": round((cpu_after[1] - cpu_before[1]) / device_rounds, 4),
            "device_peak_rss_mb": round(peak_mb, 1),
            "coordinator_rss_mb": round(coordinator_mb, 1),
            "broker_rss_mb": round(memory_mb([broker])["rss_mb"], 1),
            "register_s": round(statistics.median(register_s), 3),
            "register_s_max": round(max(register_s), 3),
        }
        result |= _idle(bed, agents, options)
    finally:
        bed.close()
    return result


def _idle(bed: Testbed, agents: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    time.sleep(LINGER_S + 5)
    before, begun = [bed.link_bytes(number) for number in range(len(agents))], time.monotonic()
    time.sleep(options.idle_s)
    after, window_s = [bed.link_bytes(number) for number in range(len(agents))], time.monotonic() - begun
    memory = [memory_mb([agent]) for agent in agents]
    up, down = (_per_round(before, after, direction, len(agents)) for direction in (0, 1))
    return {
        "device_idle_rss_mb": round(statistics.mean(entry["rss_mb"] for entry in memory), 1),
        "device_idle_pss_mb": round(statistics.mean(entry["pss_mb"] for entry in memory), 1),
        "idle_bytes_per_s": None if up is None or down is None else round((up + down) / window_s, 1),
        "idle_window_s": round(window_s),
    }


def _plan(folder: Path, options: argparse.Namespace, rounds: int) -> Plan:
    return Plan(
        name="overhead",
        bundle=str(folder / "perturb.bundle"),
        dataset="noise",
        rounds=rounds,
        participation=Participation(target=options.devices, minimum=options.devices, deadline_s=120.0),
        training=Training(steps=1, batch_size=8),
        uplink=Uplink(codec=options.codec),
        downlink=Downlink(codec=options.codec),
        evaluate_on_devices=False,
    )


def _start_agent(bed: Testbed, folder: Path, number: int, python: str) -> float:
    device = f"device-{number:03d}"
    home = folder / device
    home.mkdir()
    x = np.random.default_rng(number).standard_normal((8, 1)).astype(np.float32)  # so that no two updates are equal
    np.savez(home / "noise.npz", x=x, y=np.zeros((8, 1), np.float32))
    (home / "agent.toml").write_text(AGENT.format(device=device, url=bed.url, linger_s=LINGER_S))
    begun = time.time()
    bed.start(device, str(number), python, "-m", "edge_runtime.cli", "run", "--config", str(home / "agent.toml"))
    _wait_for(folder / "coordinator.log", f"{device} joined", 30)  # one at a time: two cores start one process well
    return begun


def _finish(store: Store, run: str, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while store.run(run).row.status == "running":
        if time.monotonic() > end:
            raise SystemExit(f"run {run} did not end within {limit_s:g} s")
        time.sleep(0.2)
    if store.run(run).row.status != "finished":
        raise SystemExit(f"run {run} {store.run(run).row.status}: {store.run(run).row.reason}")


def _wait_for(log: Path, text: str, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not log.exists() or text not in log.read_text(errors="replace"):
        if time.monotonic() > end:
            raise SystemExit(f"{log}: no {text!r} within {limit_s:g} s")
        time.sleep(0.01)


def _logged_at(log: Path, text: str) -> float:
    for line in log.read_text(errors="replace").splitlines():
        found = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) .*", line)
        if found and text in line:
            return datetime.fromisoformat(found[1]).astimezone().timestamp() + int(found[2]) / 1000
    raise SystemExit(f"{log}: no {text!r}")


def _per_round(before: list[Any], after: list[Any], direction: int, count: int) -> int | None:
    if None in before or None in after:
        return None
    total: int = sum(b[direction] - a[direction] for a, b in zip(before, after, strict=True))
    return round(total / count)


def _peak_mb(pid: int) -> float:
    import psutil

    total = 0.0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024 / 1e6
    return total


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--devices", type=int, default=2, help="how many agents")
    result.add_argument("--parameters", type=int, default=60000, help="float32 numbers in the model")
    result.add_argument("--rounds", type=int, default=30, help="measured rounds")
    result.add_argument("--codec", default="raw", help="of updates and models")
    result.add_argument("--idle-s", type=float, default=130.0, help="length of the idle window")
    result.add_argument("--work", type=Path, default=None, help="folder on a real disk for the state")
    return result


if __name__ == "__main__":
    sys.exit(main())
