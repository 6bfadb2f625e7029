"""``edge-energy measure -- COMMAND``: what a command drew, in the manner of ``perf stat``."""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.commands import ways
from energy.commands.figures import (
    amount,
    conditions_json,
    conditions_line,
    measurement_json,
    modelled_name,
    source_json,
    source_line,
)
from energy.conditions import read_conditions
from energy.errors import UsageError
from energy.meter import Meter
from energy.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from energy.measurement import Measurement

DESCRIPTION = """Runs a command and says what the machine drew meanwhile: gross, and net of idle stretches before and
after.
The figures go to standard error, with --json to standard output after the command's own, or to the file of --output.
The exit code is the command's. Without a sensor it says so, and times the command all the same."""
EXAMPLE = (
    "  edge-energy measure -- python train.py\n  edge-energy measure --repeat 5 --idle 5 --json -o drew.json -- make"
)

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T_95 = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
    2.13,
    2.12,
    2.11,
    2.10,
    2.09,
)


class Run(NamedTuple):
    """One run of the command."""

    measurement: Measurement
    cpu_seconds: float
    exit_code: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="run it so often, with an idle stretch between"
    )
    parser.add_argument(
        "--idle", type=float, default=2.0, metavar="SECONDS", help="of an idle stretch (default 2; 0: none)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON object there")
    ways.add_arguments(parser)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run, with its arguments"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; its exit code is ours."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise UsageError("measure needs a command, as in: edge-energy measure -- sleep 5")
    if options.repeat < 1 or not options.idle >= 0:
        raise UsageError("--repeat takes 1 or more, --idle 0 or more seconds")
    opened = ways.open_ways(options)
    told: list[str] = []
    meter = Meter(opened.ways, conditions=lambda: read_conditions(options.root), on_change=told.append)
    if meter.source is None and options.sensor != "none":
        _warn(ways.why_none(opened.found))
    idle_s = options.idle if meter.source is not None else 0.0
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
    _tell(options, report, lambda: _print(command, runs, meter))
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


def _idle(meter: Meter, seconds: float) -> None:
    if seconds > 0:
        with meter.open("idle", idle=True):
            time.sleep(seconds)


def _warn(text: str) -> None:
    print(f"edge-energy: {text}", file=sys.stderr)


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """The mean of runs and half of its 95 % interval (Student's t); None for a single run."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    deviation = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
    t = _T_95[count - 2] if count - 2 < len(_T_95) else 2.09
    return mean, t * deviation / count**0.5


def _report(command: list[str], runs: list[Run], meter: Meter) -> dict[str, Any]:
    sources = {one.measurement.source for one in runs}
    means: dict[str, float | None] = {}
    rows = [
        {**measurement_json(one.measurement), "cpu_seconds": one.cpu_seconds, "exit_code": one.exit_code}
        for one in runs
    ]
    names = ("joules", "net_joules", "watts")
    for name in (*names, *map(modelled_name, names), "seconds", "cpu_seconds"):
        values = [row[name] for row in rows]
        if len(sources) == 1 and all(value is not None for value in values):
            means[name], means[f"{name}_half_width"] = mean_and_half_width(values)
        else:
            means[name] = means[f"{name}_half_width"] = None
    return {
        "command": command,
        "source": source_json(runs[-1].measurement.source),
        "mean": means,
        "runs": rows,
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


def _print(command: list[str], runs: list[Run], meter: Meter) -> None:
    rows: list[tuple[str, str]] = []
    first = runs[-1].measurement
    label = " modelled" if first.source is not None and first.source.modelled else ""
    same = len({one.measurement.source for one in runs}) == 1
    if same and first.joules is not None:
        joules, width = mean_and_half_width([one.measurement.joules or 0.0 for one in runs])
        width = first.half_width_joules if width is None else width
        interval = "" if width is None else f"  ± {amount(width)} (95 %)"
        rows.append((f"{amount(joules)} J{label}", f"gross{interval}"))
        nets = [one.measurement.net_joules for one in runs]
        known = [net for net in nets if net is not None]
        if len(known) == len(nets):
            net, width = mean_and_half_width(known)
            interval = "" if width is None else f"  ± {amount(width)} (95 %)"
            idle = first.idle_watts or 0.0
            rows.append((f"{amount(net)} J{label}", f"net of {amount(idle)} W{label} idle{interval}"))
        seconds = sum(one.measurement.seconds for one in runs)
        total = sum(one.measurement.joules or 0.0 for one in runs)
        rows.append((f"{amount(total / seconds)} W{label}", "mean"))
        if not label:
            rows += [
                (f"{amount(value)} J", f"rail {name}") for name, value in first.rails.items() if len(first.rails) > 1
            ]
    seconds, width = mean_and_half_width([one.measurement.seconds for one in runs])
    rows.append((f"{seconds:.3f} s", "elapsed" + ("" if width is None else f"  ± {amount(width)} (95 %)")))
    rows.append((f"{mean_and_half_width([one.cpu_seconds for one in runs])[0]:.3f} s", "CPU"))
    times = f", {len(runs)} runs" if len(runs) > 1 else ""
    print(f"\n {' '.join(command)}{times}:\n", file=sys.stderr)
    for value, name in rows:
        print(f"{value:>22}  {name}", file=sys.stderr)
    print(f"\n source: {source_line(first.source)}", file=sys.stderr)
    if meter.conditions is not None and (line := conditions_line(meter.conditions)):
        print(f" conditions: {line}", file=sys.stderr)
    for problem in dict.fromkeys(problem for one in runs for problem in one.measurement.problems):
        print(f" problem: {problem}", file=sys.stderr)
