"""``edge-energy predict``: what a training step of a bundle will cost on the device of a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energy.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from energy.thor.estimate import Estimate

DESCRIPTION = """Predicts one training step of a bundle, layer by layer, with 90 % intervals. Reads the bundle's
manifest only; needs neither the device nor SciPy."""
EXAMPLE = "  edge-energy predict energy-profile.json model.bundle --batch 16"
UNITS = {"joules": "J", "modelled_joules": "J modelled", "cpu_seconds": "CPU s", "seconds": "s"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("profile", type=Path, metavar="PROFILE", help="energy-profile.json of the device")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle: file or folder")
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step (default 32, or the bundle's own)")
    parser.add_argument(
        "--quantity", choices=sorted(UNITS), help="what to predict (default: what the profile reports, and seconds)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave kinds out that were never profiled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Predicts and prints."""
    from energy.thor.bundle import bundle_layers
    from energy.thor.estimate import estimate
    from energy.thor.profile import Quantity, load_profile

    if options.batch is not None and options.batch < 1:
        raise UsageError("--batch takes a whole number from 1")
    profile = load_profile(options.profile)
    name, layers = bundle_layers(options.bundle, options.batch)
    fitted = {quantity for family in profile.families for quantity in family.fitted}
    wanted: list[Quantity] = [options.quantity or profile.quantity]
    if options.quantity is None and "seconds" in fitted and "seconds" not in wanted:
        wanted.append("seconds")
    found = [estimate(profile, layers, quantity, allow_missing=options.allow_missing) for quantity in wanted]
    if options.json:
        print(
            json.dumps({"model": name, "device": profile.device.name, "steps": [_row(one) for one in found]}, indent=1)
        )
    else:
        print(f"{name} on {profile.device.name or 'the profiled device'}, one training step")
        for one in found:
            _print(one)
    return 0


def _row(found: Estimate) -> dict[str, Any]:
    quantity = found.quantity
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            f"predicted_{quantity}": layer.mean,
            f"low_{quantity}": layer.low,
            f"high_{quantity}": layer.high,
            "extrapolated": layer.extrapolated,
        }
        for layer in found.layers
    ]
    return {
        f"predicted_{quantity}": found.total,
        f"low_{quantity}": found.low,
        f"high_{quantity}": found.high,
        f"fixed_{quantity}": found.fixed,
        "missing_kinds": list(found.missing),
        "missing_share_of_flops": found.missing_share,
        "layers": layers,
    }


def _print(found: Estimate) -> None:
    unit = UNITS[found.quantity]
    print(f"\n{found.total:.4g} {unit}, 90 % interval {found.low:.4g} to {found.high:.4g}")
    width = max([12, *(len(layer.name) for layer in found.layers)]) + 2
    for layer in sorted(found.layers, key=lambda layer: -layer.mean):
        note = "  beyond the profiled sizes" if layer.extrapolated else ""
        bounds = f"{layer.low:>11.4g} to {layer.high:<9.4g}"
        print(
            f"  {layer.name:<{width}}{layer.kind:<26}{layer.mean:>10.4g}{bounds}{layer.mean / found.total:>5.0%}{note}"
        )
    print(f"  {'(every step)':<{width}}{'':<26}{found.fixed:>10.4g}")
    if found.missing:
        share = f"{found.missing_share:.1%} of the forward FLOPs"
        print(f"  not in the total, never profiled: {', '.join(found.missing)} ({share})")
