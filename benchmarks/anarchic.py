"""Devices that choose their moments and their steps: AFA-CD, AFA-CS, FedBuff and FedAvg, beside FedAvg in rounds.

    python -m benchmarks.anarchic --devices 120 --seeds 5

The worlds of ``benchmarks.scheduling``. With AFA-CD, AFA-CS, FedBuff and FedAvg every device holds a standing
assignment: it trains whenever it likes, about ``--interval-s`` apart, for any number of steps up to ``--steps``, drawn
afresh each time. AFA divides an update by its steps, the others do not; FedAvg weighs by samples. ``fedavg_in_rounds``
is synchronous, devices drawn at random: there a device may only end a job early, which it does when the job has drawn
``--job-joules``, and what it reached counts. All devices keep their battery's reserve by declining. All energies are
from the device model of the traces, not measured.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from benchmarks.participation import Policy
from benchmarks.participation_figures import summary
from benchmarks.report import parser, print_report
from benchmarks.scheduling import add_world, run_all, save_curves, seeds
from benchmarks.scheduling_data import PROBLEMS

if TYPE_CHECKING:
    import argparse

BASE = "fedavg_in_rounds"
SERVER_LR = {"afa_cs": 0.2}  # every row acts on some twelve models: with 1 it swings (of 1, 0.5, 0.2, on seed 100)


def policies(options: argparse.Namespace) -> dict[str, Policy]:
    """The methods; FedAvg in rounds is what the others are compared with."""
    standing: dict[str, Any] = {"mode": "anarchic", "interval_s": options.interval_s}
    free = {"steps": options.steps}
    kept = {"keep_reserve": True, "free_steps": True}
    found = {BASE: Policy({"training": {**free, "job_joules": options.job_joules}}, {"keep_reserve": True})}
    for method in ("afa_cd", "afa_cs", "fedbuff", "fedavg"):
        plan = {"participation": standing, "training": free, "server_method": method}
        plan["server_optimizer_options"] = {"lr": SERVER_LR.get(method, 1.0)}
        found[method] = Policy(plan, kept)
    return found


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    datasets, compared = options.datasets.split(","), policies(options)
    runs = run_all(options, datasets, compared)
    results = []
    for dataset in datasets:
        base = [runs[dataset, BASE, seed] for seed in seeds(options)]
        for name in compared:
            of = [runs[dataset, name, seed] for seed in seeds(options)]
            figures = summary(of, base, PROBLEMS[dataset].targets)
            results.append({"dataset": dataset, "method": name, "energies": "from the device model", **figures})
    if options.curves is not None:
        save_curves(options.curves, runs)
    print_report("anarchic", options, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    add_world(result)
    result.add_argument("--steps", type=int, default=20, help="the most local steps")
    result.add_argument("--interval-s", type=float, default=1800.0, help="virtual seconds between jobs of a device")
    result.add_argument("--job-joules", type=float, default=1000.0, help="after which devices end a job of FedAvg")
    return result


if __name__ == "__main__":
    sys.exit(main())
