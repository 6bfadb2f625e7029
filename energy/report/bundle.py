"""What the layers of a bundle are predicted to cost on the device of a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.report.profile_data import BundleCost, LayerCost
from energy.thor.bundle import bundle_layers
from energy.thor.estimate import estimate

if TYPE_CHECKING:
    from pathlib import Path

    from energy.thor.profile import Profile


def bundle_cost(profile: Profile, path: Path, batch: int | None = None) -> BundleCost:
    """One training step with ``batch`` samples (None: what the bundle or its layer table has by itself).

    Raises:
        ProfileError: no bundle, one without a layer table, or a kind of layer that was never profiled.
    """
    bundle = bundle_layers(path, batch)
    found = estimate(profile, bundle.layers)
    costs = [
        LayerCost(layer.name, layer.kind, layer.mean, layer.low, layer.high, layer.extrapolated)
        for layer in found.layers
    ]
    if found.fixed > 0:
        costs.append(LayerCost("every step", "fixed cost", found.fixed, found.fixed, found.fixed, extrapolated=False))
    return BundleCost(bundle.name, found.total, found.low, found.high, costs)
