"""``edge-energy calibrate``: fits the modelled sensor to one that measures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from energy.commands import ways
from energy.errors import UsageError
from energy.metering.calibration import calibrate, save_calibration

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """Loads the machine step by step, from idle to all cores, while a sensor measures, and fits
idle and busy power. Machines of the same kind without a sensor can then report modelled joules.
Let nothing else run meanwhile."""
EXAMPLE = "  edge-energy calibrate -o modelled.json\n  edge-energy measure --model modelled.json -- sleep 5"
DOUBTFUL = 0.1  # a residual above this share of the range from idle to busy is said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("--seconds", type=float, default=10.0, help="at every level of load, up and down (default 10)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the calibration (JSON)")
    ways.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Calibrates against the best sensor, or the one that is named."""
    if not options.seconds > 0:
        raise UsageError("--seconds takes more than 0")
    opened = ways.open_ways(options)
    measuring = [way for way in opened.ways if not any(sensor.source.modelled for sensor in way)]
    try:
        if not measuring:
            raise UsageError(f"calibrating needs a sensor that measures: {ways.why_none(opened.found)}")
        found = calibrate(measuring[0], seconds=options.seconds, say=lambda text: print(text, file=sys.stderr))
    finally:
        ways.close_all(tuple(sensor for way in opened.ways for sensor in way))
    save_calibration(found, options.output)
    print(
        f"{options.output}: {found.idle_watts:.2f} W idle, {found.busy_watts:.2f} W with {found.cores} cores busy, "
        f"residual {found.residual_watts:.2f} W, against {found.sensor} ({found.scope})"
    )
    if found.residual_watts > DOUBTFUL * (found.busy_watts - found.idle_watts):
        print("the residual is large: power does not follow the load alone here (clocks, other work)", file=sys.stderr)
    return 0
