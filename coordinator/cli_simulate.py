"""``edge-coordinator simulate``: runs a plan on a virtual fleet."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.cli_commands import print_json
from coordinator.errors import PluginError
from edge_runtime.errors import BundleError, ConfigError, DataError

if TYPE_CHECKING:
    from coordinator.plan import Plan
    from coordinator.simulation import Shares, SimulationReport
    from coordinator.simulation.report import Progress
    from coordinator.simulation.settings import StepSource
    from coordinator.simulation.traces import Traces

_ASSUMED_STEP_MS = 10.0  # where nothing is trained, so nothing can be measured


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("plan", type=Path, help="the plan, a TOML file as for submit")
    world = "devices come from traces; without them a synthetic fleet is made by the seed"
    add("--devices", type=_count, metavar="N", help=f"how many (default: all of the traces); {world}")
    add("--traces", type=Path, metavar="DIR", help="folder with devices.jsonl, links.jsonl and presence.jsonl")
    add("--data", type=Path, metavar="FILE.npz", help="training data of all devices: arrays x, y and maybe group")
    add("--partition", metavar="HOW", help="of --data: iid, dirichlet:ALPHA or groups (default: iid)")
    add("--no-training", action="store_true", help="updates are echoes: for scale, selection and recovery")
    add("--seed", type=_count0, default=0, metavar="N", help="of partition, synthetic fleet and faults (default: 0)")
    add(
        "--step-ms",
        type=_positive,
        metavar="MS",
        help="what a training step takes on the reference device (default: measured here; 10 where nothing is trained)",
    )
    add("--leaving", choices=("ends", "continues"), default="ends", help="what a job does when its device goes offline")
    add("--keep-reserve", action="store_true", help="devices decline jobs that would go below their battery's reserve")
    add("--free-steps", action="store_true", help="standing assignments: devices choose any number of steps")
    add(
        "--limit-hours",
        type=_positive,
        metavar="H",
        help="end the run after so much virtual time (default: 30 days without a version)",
    )
    add("--device-accuracy", action="store_true", help="evaluate the final model on the data of every device")
    add("--faults", metavar="WHAT", help="default, or as broker=2,coordinator=3,clock=1,agents=0.05,workers=0.05,...")
    add("--processes", type=_count0, default=0, metavar="N", help="that train and sum (default: one per CPU)")
    add(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="train and sum on a Ray cluster (no address: a local one)"
    )


def simulate(options: argparse.Namespace) -> int:
    """Simulates; 1 if the run failed or stalled, or did what must never happen."""
    from coordinator.plan import load_plan
    from coordinator.simulation import Settings, load_data, parse_faults, share_out

    plan = load_plan(options.plan)
    if (options.data is None) != options.no_training:
        raise ConfigError("give the devices' data as --data FILE.npz, or --no-training, and not both")
    for name in ("partition", "device_accuracy"):
        if options.no_training and getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for --data; leave it out with --no-training")
    traces = _traces(options)
    shares = None
    if options.data is not None:
        wanted = [device.samples for device in traces.devices]
        data = load_data(options.data)
        shares = share_out(data, options.partition or "iid", len(traces.devices), seed=options.seed, samples=wanted)
    faults = parse_faults(options.faults or "")
    step_ms, source = _step_ms(options, plan, shares)
    settings = Settings(
        seed=options.seed,
        step_s=step_ms / 1000,
        step_source=source,
        leaving=options.leaving,
        keep_reserve=options.keep_reserve,
        free_steps=options.free_steps,
        limit_s=None if options.limit_hours is None else 3600.0 * options.limit_hours,
        device_accuracy=options.device_accuracy,
    )
    from coordinator.executors import open_executor
    from coordinator.simulation import simulate as run

    executor = open_executor(options.processes, options.ray)
    try:
        report = run(
            plan, traces, settings, shares=shares, faults=faults, executor=executor, on_progress=_tell_progress
        )
    except (ConfigError, BundleError, DataError, PluginError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it can be had again
        return _failed(error, options, step_ms)
    finally:
        executor.close()
    return _tell(report, options, step_ms)


def _traces(options: argparse.Namespace) -> Traces:
    from coordinator.simulation.synthetic import synthetic
    from coordinator.simulation.traces import read_traces

    if options.traces is not None:
        traces = read_traces(options.traces)
        return traces if options.devices is None else traces.resized(options.devices)
    if options.devices is None:
        raise ConfigError("say how many devices there are: --devices N, or --traces DIR")
    return synthetic(options.devices, options.seed)


def _step_ms(options: argparse.Namespace, plan: Plan, shares: Shares | None) -> tuple[float, StepSource]:
    """What a step takes on the reference device; measured, to two digits: more of them say nothing."""
    if options.step_ms is not None:
        return options.step_ms, "given"
    if shares is None:
        return _ASSUMED_STEP_MS, "assumed"
    from coordinator.simulation.training import measure_step_s

    return float(f"{1000 * measure_step_s(plan, shares):.2g}"), "measured"


def _tell(report: SimulationReport, options: argparse.Namespace, step_ms: float) -> int:
    """Prints the report, and the one command that gives it again, whatever came of the run."""
    from coordinator.simulation import as_json, as_text

    if options.json:
        print_json({**as_json(report), "replay": _command(options, step_ms)})
    else:
        print(as_text(report))
        print(f"replay: {_command(options, step_ms)}")
    return 1 if report.status in ("failed", "stalled") else 0


def _tell_progress(progress: Progress) -> None:
    """On standard error: the report may be read by a program."""
    from coordinator.simulation.report import as_progress

    print(as_progress(progress), file=sys.stderr, flush=True)


def _failed(error: Exception, options: argparse.Namespace, step_ms: float) -> int:
    from coordinator.simulation import BrokenRuleError

    if not isinstance(error, BrokenRuleError):
        traceback.print_exception(error)
    line = " ".join(str(error).split()) or type(error).__name__
    print(f"edge-coordinator: the simulated run broke: {line}", file=sys.stderr)
    print(f"replay: {_command(options, step_ms)}", file=sys.stderr)
    return 1


def _command(options: argparse.Namespace, step_ms: float) -> str:
    """The command that gives the same run again, wherever and by however many processes."""
    parts = ["edge-coordinator", "simulate", str(options.plan), "--seed", str(options.seed)]
    parts += ["--step-ms", repr(step_ms)]
    for name in ("devices", "traces", "data", "partition", "leaving", "limit_hours", "faults"):
        value = getattr(options, name)
        if value is not None:
            parts += [f"--{name.replace('_', '-')}", str(value)]
    switches = ("no_training", "keep_reserve", "free_steps", "device_accuracy")
    parts += [f"--{name.replace('_', '-')}" for name in switches if getattr(options, name)]
    return shlex.join(parts)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 10,000,000")
    return int(text)


def _count0(text: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 53:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
