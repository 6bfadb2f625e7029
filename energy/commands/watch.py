"""``edge-energy watch``: power live, in a terminal or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from energy.commands import ways
from energy.commands.figures import amount, conditions_json, conditions_line, measurement_json, source_json, source_line
from energy.errors import EnergyError
from energy.metering.conditions import read_conditions
from energy.metering.meter import Meter

if TYPE_CHECKING:
    import argparse

    from energy.metering.measurement import Measurement

DESCRIPTION = """Shows the mean power of every interval until it is interrupted. In a pipe, or with --json, it prints
one JSON object per line."""
EXAMPLE = "  edge-energy watch\n  edge-energy watch --interval 5 --json > power.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="of one line (default 1)")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many")
    parser.add_argument("--json", action="store_true", help="JSON lines in a terminal too")
    ways.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Runs until interrupted, or until nothing can be read any more."""
    opened = ways.open_ways(options)
    notes: list[str] = []
    meter = Meter(opened.ways, conditions=lambda: read_conditions(options.root), on_change=notes.append)
    try:
        if meter.source is None:
            raise EnergyError(ways.why_none(opened.found))
        _watch(meter, options, notes)
    except KeyboardInterrupt:
        print()  # ends the line with ^C
    finally:
        meter.close()
    return 0


def _watch(meter: Meter, options: argparse.Namespace, notes: list[str]) -> None:
    live = sys.stdout.isatty() and not options.json
    interval_s = max(options.interval, 0.1)
    total = 0.0
    began_s = meter.clock()
    line = 0
    while options.count is None or line < options.count:
        line += 1
        with meter.open("interval") as window:
            while (left_s := began_s + line * interval_s - meter.clock()) > 0:
                time.sleep(min(left_s, max(meter.interval_s, 0.1)))
                meter.sample()
        measurement = window.close()
        total += measurement.joules or 0.0
        for note in notes:
            print(f"edge-energy: {note}", file=sys.stderr)
        notes.clear()
        if live:
            _show(meter, measurement, total, meter.clock() - began_s)
        else:
            print(json.dumps(_line(meter, measurement)), flush=True)
        if measurement.source is None and meter.source is None:
            raise EnergyError("; ".join(measurement.problems) or "nothing can be read any more")


def _line(meter: Meter, measurement: Measurement) -> dict[str, Any]:
    rails = {} if measurement.source is None or measurement.source.modelled else meter.rail_watts
    return {
        "unix_s": round(time.time(), 3),
        "source": source_json(measurement.source),
        **measurement_json(measurement),
        "rails_watts": rails,
        "conditions": conditions_json(meter.conditions),
    }


def _show(meter: Meter, measurement: Measurement, total: float, seconds: float) -> None:
    modelled = measurement.source is not None and measurement.source.modelled
    label = " modelled" if modelled else ""
    watts = "-" if measurement.joules is None else amount(measurement.joules / measurement.seconds)
    rows = [f"{watts:>10} W{label}  mean of {measurement.seconds:.1f} s, {amount(total)} J{label} in {seconds:.0f} s"]
    rows += [f"{value:>10.3f} W  {name}" for name, value in meter.rail_watts.items() if not modelled]
    rows += [source_line(measurement.source), conditions_line(meter.conditions)]
    rows += [f"problem: {problem}" for problem in measurement.problems]
    print("\x1b[H\x1b[J" + "\n".join(row for row in rows if row), flush=True)
