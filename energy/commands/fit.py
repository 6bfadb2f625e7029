"""``edge-energy fit``: models for a profile whose layers were only measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from energy.commands.costs import QUANTITY_NAMES
from energy.errors import UsageError

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """Fits a Gaussian process to every kind of layer of a profile, for every quantity that was measured.
Devices without SciPy measure with edge-energy profile --measure-only; this runs on a workstation.
Kinds with too few points are left out, and named. Points stay as they are."""
EXAMPLE = "  edge-energy fit energy-profile.json\n  edge-energy fit measured.json -o energy-profile.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("points", type=Path, metavar="PROFILE", help="a profile, with or without fitted models")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the fitted profile (default: in place)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the order in which points are left out to find the width of intervals (default 0)",
    )


def run(options: argparse.Namespace) -> int:
    """Fits, writes and says how well points are predicted from the others."""
    from energy.thor.anchoring import anchored
    from energy.thor.fitting import fit_profile, left_out_error
    from energy.thor.profile import load_profile, save_profile

    output = options.output or options.points
    if not output.parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.parent}; make it, or choose another -o")
    started = time.monotonic()
    profile = anchored(fit_profile(load_profile(options.points), options.seed))
    save_profile(profile, output)
    print(f"{'kind':<28}{'points':>7}{'quantity':>18}{'median error':>14}{'interval x':>12}")
    for family in profile.families:
        for quantity, fitted in family.fitted.items():
            error = left_out_error(family, quantity)
            print(
                f"{family.kind:<28}{len(family.points):>7}{QUANTITY_NAMES[quantity]:>18}{error:>14.1%}{fitted.spread:>12.2f}"
            )
    for quantity, factor in profile.factor.items():
        models = ", ".join(whole.model for whole in profile.wholes if whole.quantity == quantity)
        print(f"whole models cost {factor:.3f} of what their layers say in {QUANTITY_NAMES[quantity]}, by {models}")
    for note in profile.notes:
        print(f"note: {note}")
    print(f"{output}: fitted in {time.monotonic() - started:.1f} s; median error of points left out one at a time")
    return 0
