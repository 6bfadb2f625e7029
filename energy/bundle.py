"""The layers of a bundle file, read from its manifest alone."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import ProfileError
from energy.layers import partition

if TYPE_CHECKING:
    from pathlib import Path

    from energy.layers import LayerSpec

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
_CURE = "name a bundle that edge-export wrote"


class BundleLayers(NamedTuple):
    """Name of the model, and the layers of one of its training steps."""

    name: str
    layers: list[LayerSpec]


def bundle_layers(path: Path, batch: int | None = None) -> BundleLayers:
    """Layers of the bundle at ``path``, a zip file or a folder; ``batch`` as in :func:`energy.layers.partition`.

    Raises:
        ProfileError: no bundle, one without a layer table, or a damaged one.
    """
    manifest = _manifest(path)
    try:
        return BundleLayers(str(manifest.get("name") or path.name), partition(manifest, batch))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ProfileError(f"{path}: its layer table is damaged ({error!r}); export the bundle again") from error


def _manifest(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            data = (path / MANIFEST_NAME).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo(MANIFEST_NAME).file_size > MAX_MANIFEST_BYTES:
                    raise ProfileError(f"{path}: its manifest is too large; {_CURE}")
                data = archive.read(MANIFEST_NAME)
        manifest = json.loads(data)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); {_CURE}") from error
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is no bundle ({error}); {_CURE}") from error
    if not isinstance(manifest, dict):
        raise ProfileError(f"{path}: is no bundle; {_CURE}")
    return manifest
