"""``edge-energy measure -- COMMAND``: what a command drew, in the manner of ``perf stat``."""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energy.commands import ways
from energy.commands.figures import amount, conditions_json, conditions_line, modelled_name, source_json, source_line
from energy.commands.runs import Run, counted, left_out, means, run_json
from energy.errors import UsageError
from energy.metering.conditions import read_conditions
from energy.metering.meter import Meter
from energy.metering.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIPTION = """Runs a command and says what the machine drew meanwhile: gross, and net of idle stretches before and
after.
The figures go to standard error. With --json they go to standard output instead, as one object after the command's own
output; with -o FILE the object goes to that file, with or without --json, and nothing of it to standard output.
The exit code is the command's. Without a sensor it says so, and times the command all the same."""
EXAMPLE = (
    "  edge-energy measure -- python train.py\n  edge-energy measure --repeat 5 --idle 5 --json -o drew.json -- make"
)
MOST_IDLE_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="run it so often, with an idle stretch between"
    )
    parser.add_argument(
        "--idle",
        type=float,
        metavar="SECONDS",
        help="of an idle stretch (default: 2, or as long as the sensor needs, at most 30; 0: none)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the JSON object there; the figures go to standard error",
    )
    ways.add_arguments(parser)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run, with its arguments"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; its exit code is ours."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise UsageError("measure needs a command, as in: edge-energy measure -- sleep 5")
    if options.repeat < 1 or not (options.idle is None or options.idle >= 0):
        raise UsageError("--repeat takes 1 or more, --idle 0 or more seconds")
    opened = ways.open_ways(options)
    told: list[str] = []
    meter = Meter(opened.ways, conditions=lambda: read_conditions(options.root), on_change=told.append)
    if meter.source is None and options.sensor != "none":
        _warn(ways.why_none(opened.found))
    idle_s = _idle_s(options.idle, meter)
    runs: list[Run] = []
    try:
        with Sampler(meter):
            _idle(meter, idle_s)
            for number in range(options.repeat):
                runs.append(_run(meter, f"run {number + 1}", command))
                _idle(meter, idle_s)
                if runs[-1].exit_code < 0:
                    break  # interrupted
        runs = [one._replace(measurement=meter.rebased(one.measurement)) for one in runs]
        report = _report(command, runs, meter)
    finally:
        meter.close()
    for text in told if opened.ways else ():
        _warn(text)
    _tell(options, report, lambda: _print(report, runs, meter))
    code = next((one.exit_code for one in reversed(runs) if one.exit_code), 0)
    return code if code >= 0 else 128 - code


def _run(meter: Meter, name: str, command: list[str]) -> Run:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with meter.open(name) as window:
        # The terminal sends ^C to the command as well; we wait for it to end and say what it drew until then. A handler
        # is not inherited through exec, as ignoring would be.
        handler = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            code = subprocess.Popen(command).wait()
        except OSError as error:
            raise UsageError(f"{command[0]}: cannot be run ({error.strerror})") from error
        finally:
            signal.signal(signal.SIGINT, handler)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Run(window.close(), cpu_s, code)


def _idle_s(wanted_s: float | None, meter: Meter) -> float:
    if meter.source is None:
        return 0.0
    if wanted_s is None:
        return min(meter.least_idle_s, MOST_IDLE_S)
    if 0 < wanted_s < meter.least_idle_s:
        _warn(
            f"--idle {wanted_s:g} is too short for {meter.source.sensor}, so there are no net joules; "
            f"give {meter.least_idle_s:g} or more"
        )
    return wanted_s


def _idle(meter: Meter, seconds: float) -> None:
    if seconds > 0:
        with meter.open("idle", idle=True):
            time.sleep(seconds)


def _warn(text: str) -> None:
    print(f"edge-energy: {text}", file=sys.stderr)


def _report(command: list[str], runs: list[Run], meter: Meter) -> dict[str, Any]:
    counting = counted(runs)
    return {
        "command": command,
        "source": source_json(counting[-1].measurement.source),
        "mean": means(runs),
        "counted_runs": len(counting),
        "left_out_runs": len(runs) - len(counting),
        "note": left_out(runs),
        "runs": [run_json(run) for run in runs],
        "conditions": conditions_json(meter.conditions),
    }


def _tell(options: argparse.Namespace, report: dict[str, Any], show: Callable[[], None]) -> None:
    text = json.dumps(report, indent=1)
    if options.output is not None:
        try:
            options.output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{options.output}: cannot be written ({error.strerror}); choose another place") from error
    elif options.json:
        print(text)
        return
    show()


def _print(report: dict[str, Any], runs: list[Run], meter: Meter) -> None:
    last = counted(runs)[-1].measurement
    modelled = last.source is not None and last.source.modelled
    rows = _figures(report["mean"], modelled=modelled, half_width=last.half_width_joules)
    times = f", {len(runs)} runs" if len(runs) > 1 else ""
    print(f"\n {shlex.join(report['command'])}{times}:\n", file=sys.stderr)
    for value, name in rows:
        print(f"{value:>22}  {name}", file=sys.stderr)
    print(f"\n source: {source_line(last.source)}", file=sys.stderr)
    if meter.conditions is not None and (line := conditions_line(meter.conditions)):
        print(f" conditions: {line}", file=sys.stderr)
    if report["note"]:
        print(f" note: {report['note']}", file=sys.stderr)
    for problem in dict.fromkeys(problem for one in runs for problem in one.measurement.problems):
        print(f" problem: {problem}", file=sys.stderr)


def _figures(mean: dict[str, Any], *, modelled: bool, half_width: float | None) -> list[tuple[str, str]]:
    """Means with what they are; ``half_width`` is that of a single run."""
    label = " modelled" if modelled else ""

    def get(name: str) -> tuple[Any, str]:
        key = modelled_name(name) if modelled else name
        width = mean[f"{key}_half_width"]
        if width is None and name == "joules":
            width = half_width
        return mean[key], "" if width is None else f"  ± {amount(width)} (95 %)"

    rows: list[tuple[str, str]] = []
    joules, interval = get("joules")
    if joules is not None:
        rows.append((f"{amount(joules)} J{label}", f"gross{interval}"))
        net, interval = get("net_joules")
        if net is not None:
            idle, _ = get("idle_watts")
            rows.append((f"{amount(net)} J{label}", f"net of {amount(idle)} W{label} idle{interval}"))
        rows.append((f"{amount(get('watts')[0])} W{label}", "mean"))
        rails = mean["rails_joules"]
        if len(rails) > 1:
            rows += [(f"{amount(value)} J", f"rail {name}") for name, value in rails.items()]
    width = mean["seconds_half_width"]
    rows.append((f"{mean['seconds']:.3f} s", "elapsed" + ("" if width is None else f"  ± {amount(width)} (95 %)")))
    rows.append((f"{mean['cpu_seconds']:.3f} s", "CPU"))
    return rows
