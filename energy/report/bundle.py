"""What the layers of a bundle are predicted to cost on the device of a profile."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

from energy.errors import ProfileError
from energy.report.profile_data import BundleCost, LayerCost

if TYPE_CHECKING:
    from pathlib import Path

    from energy.profile import Profile

LARGEST_MANIFEST_BYTES = 64 * 1024 * 1024


def bundle_cost(profile: Profile, path: Path, batch: int | None = None) -> BundleCost:
    """One training step with ``batch`` samples (None: what the bundle or the layer table has by itself).

    Raises:
        ProfileError: no bundle, one without a layer table, or a kind of layer that was never profiled.
    """
    from energy.estimate import estimate
    from energy.layers import partition

    manifest = _manifest(path)
    try:
        layers = partition(manifest, batch)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path}: its layer table is damaged ({error!r}); export the bundle again") from error
    found = estimate(profile, layers)
    costs = [
        LayerCost(layer.name, layer.kind, layer.mean, layer.low, layer.high, layer.extrapolated)
        for layer in found.layers
    ]
    if found.fixed > 0:
        costs.append(LayerCost("every step", "fixed cost", found.fixed, found.fixed, found.fixed, extrapolated=False))
    return BundleCost(str(manifest.get("name") or path.name), found.total, found.low, found.high, costs)


def _manifest(path: Path) -> dict[str, Any]:
    """``manifest.json`` of a bundle: a zip file or a folder."""
    cure = "name a bundle that edge-export wrote"
    try:
        if path.is_dir():
            data = (path / "manifest.json").read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("manifest.json").file_size > LARGEST_MANIFEST_BYTES:
                    raise ProfileError(f"{path}: its manifest is too large; {cure}")
                data = archive.read("manifest.json")
        manifest = json.loads(data)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); {cure}") from error
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is no bundle ({error}); {cure}") from error
    if not isinstance(manifest, dict):
        raise ProfileError(f"{path}: is no bundle; {cure}")
    return manifest
