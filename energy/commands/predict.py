"""``edge-energy predict``: what a training step of a bundle will cost on the device of a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energy.commands.costs import QUANTITY_NAMES, amount, anchor_count, factor_line
from energy.errors import ProfileError, UsageError

if TYPE_CHECKING:
    import argparse

    from energy.thor.estimate import Estimate
    from energy.thor.layers import LayerSpec
    from energy.thor.profile import Profile, Quantity

DESCRIPTION = """Predicts one training step of a bundle, layer by layer, with 90 % intervals. Reads the bundle's
manifest only; needs neither the device nor SciPy."""
EXAMPLE = "  edge-energy predict energy-profile.json model.bundle --batch 16"
INTERVAL = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("profile", type=Path, metavar="PROFILE", help="energy-profile.json of the device")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle: file or folder")
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step (default 32, or the bundle's own)")
    parser.add_argument(
        "--quantity",
        choices=sorted(QUANTITY_NAMES),
        help="what to predict (default: what the profile reports, and seconds)",
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave kinds out that were never profiled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Predicts and prints."""
    from energy.thor.bundle import bundle_layers, step_batch
    from energy.thor.estimate import estimate
    from energy.thor.profile import load_profile

    if options.batch is not None and options.batch < 1:
        raise UsageError("--batch takes a whole number from 1")
    profile = load_profile(options.profile)
    name, layers = bundle_layers(options.bundle, options.batch)
    wanted = _wanted(profile, options)
    if not options.allow_missing:
        _all_known(profile, layers, wanted)
    found = [estimate(profile, layers, quantity, allow_missing=options.allow_missing) for quantity in wanted]
    batch, threads = step_batch(layers), profile.device.threads
    if options.json:
        head = {"model": name, "device": profile.device.name, "batch": batch, "threads": threads, "interval": INTERVAL}
        print(json.dumps({**head, "steps": [_row(profile, one) for one in found]}, indent=1))
    else:
        where = profile.device.name or "the profiled device"
        counts = f"batch {batch}, {threads} thread{'' if threads == 1 else 's'}"
        print(f"one training step of {name} on {where}, {counts}, {factor_line(profile, [*wanted])}")
        for one in found:
            _print(one)
    return 0


def _wanted(profile: Profile, options: argparse.Namespace) -> list[Quantity]:
    """What to predict; a quantity that was never measured is refused by what there is."""
    asked: Quantity | None = options.quantity
    fitted = {quantity for family in profile.families for quantity in family.fitted}
    if asked is None:
        both = "seconds" in fitted and profile.quantity != "seconds"
        return [profile.quantity, "seconds"] if both else [profile.quantity]
    measured = {quantity for family in profile.families for point in family.points for quantity in point.costs}
    if asked not in measured:
        there = ", ".join(sorted(measured)) or "nothing"
        why = " (it was measured without a sensor)" if profile.sensed is None and "joules" in asked else ""
        raise UsageError(f"{options.profile}: has no {asked}{why}, but {there}; give one of these to --quantity")
    return [asked]


def _all_known(profile: Profile, layers: list[LayerSpec], wanted: list[Quantity]) -> None:
    for quantity in wanted:
        known = {family.kind for family in profile.families if quantity in family.fitted}
        missing = sorted({layer.kind for layer in layers} - known)
        if known and missing:
            raise ProfileError(
                f"this profile knows no {', '.join(missing)}; profile the device with probes of this bundle, or give "
                "--allow-missing to leave them out of the sum"
            )


def _row(profile: Profile, found: Estimate) -> dict[str, Any]:
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
        "factor": profile.factor.get(quantity, 1.0),
        "anchors": anchor_count(profile, quantity),
        "missing_kinds": list(found.missing),
        "missing_share_of_flops": found.missing_share,
        "layers": layers,
    }


def _print(found: Estimate) -> None:
    def figure(value: float) -> str:
        return amount(value, found.quantity)

    name = QUANTITY_NAMES[found.quantity]
    print(f"\n{name}: {figure(found.total)}, 90 % interval {figure(found.low)} to {figure(found.high)}")
    width = max([12, *(len(layer.name) for layer in found.layers)]) + 2
    for layer in sorted(found.layers, key=lambda layer: -layer.mean):
        note = "  beyond the profiled sizes" if layer.extrapolated else ""
        bounds = f"{figure(layer.low):>11} to {figure(layer.high):<9}"
        share = layer.mean / found.total
        print(f"  {layer.name:<{width}}{layer.kind:<26}{figure(layer.mean):>10}{bounds}{share:>5.0%}{note}")
    print(f"  {'(every step)':<{width}}{'':<26}{figure(found.fixed):>10}")
    if found.missing:
        lost = f"{found.missing_share:.1%} of the forward FLOPs"
        print(f"  not in the total, never profiled: {', '.join(found.missing)} ({lost})")
