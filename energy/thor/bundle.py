"""A bundle as this package sees it: the layers of its manifest, and its training step as a graph to meter.

Nothing of the file is believed: sizes have bounds, and the graph is looked over before anything may load it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import ProfileError
from energy.graph_check import GraphError, check_graph
from energy.thor.layers import partition
from energy.thor.pack import NO_ZIP
from energy.thor.profile import MAX_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from energy.thor.layers import LayerSpec

MANIFEST_NAME = "manifest.json"
TRAIN_NAME = "train.onnx"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_GRAPH_BYTES = 2**31
MAX_LAYERS = 100_000
MAX_STACKED = 1000  # recurrent layers in one
MAX_CLASSES = 2**31 - 1
_CURE = "name a bundle that edge-export wrote"
_NO_NUMBER = ("invalid literal", "could not convert", "cannot convert", "Exceeds the limit")
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)


class BundleLayers(NamedTuple):
    """Name of the model, and the layers of one of its training steps."""

    name: str
    layers: list[LayerSpec]


class BundleStep(NamedTuple):
    """A bundle's training step to run: arguments of :class:`energy.thor.probing.Stepper` beside its layers.

    ``limits``: values of integer inputs stay below these. ``hyper``: values of the optimiser's scalar inputs.
    """

    name: str
    layers: list[LayerSpec]
    graph: bytes
    limits: dict[str, int]
    hyper: dict[str, float]


def bundle_layers(path: Path, batch: int | None = None) -> BundleLayers:
    """Layers of the bundle at ``path``, a zip file or a folder; ``batch`` as in :func:`energy.thor.layers.partition`.

    Raises:
        ProfileError: no bundle, one without a layer table, or a damaged one.
    """
    return _layers(path, _manifest(path), batch)


def bundle_step(path: Path, batch: int | None = None) -> BundleStep:
    """The training step of the bundle at ``path``, its bytes checked against their SHA-256 and looked over.

    Raises:
        ProfileError: no bundle, a damaged one, or one whose graph may not be loaded.
    """
    manifest = _manifest(path)
    name, layers = _layers(path, manifest, batch)
    try:
        listed = manifest["files"][TRAIN_NAME]["sha256"]
        limits = {"y": int(manifest["task"]["classes"] or 2)}
        hyper = {str(key): float(value) for key, value in manifest["optimizer"]["hyper"].items()}
    except _DAMAGED as error:
        raise ProfileError(f"{path}: its manifest is damaged ({_short(error)}); export the bundle again") from error
    if not 1 <= limits["y"] <= MAX_CLASSES or not all(math.isfinite(value) for value in hyper.values()):
        raise ProfileError(f"{path}: its manifest is damaged (classes or optimiser); export the bundle again")
    embedded = next((layer for layer in layers if layer.kind == "embedding"), None)
    if embedded is not None:
        limits["x"] = min(embedded.sizes.get("in_channels", 1), MAX_CLASSES)
    graph = _read(path, TRAIN_NAME, MAX_GRAPH_BYTES)
    if hashlib.sha256(graph).hexdigest() != listed:
        raise ProfileError(f"{path}: {TRAIN_NAME} does not match its SHA-256; copy the bundle again")
    try:
        check_graph(graph)
    except GraphError as error:
        raise ProfileError(f"{path}: {TRAIN_NAME}: {error}") from error
    return BundleStep(name, layers, graph, limits, hyper)


def step_batch(layers: list[LayerSpec]) -> int:
    """Samples per step of these layers."""
    return max((layer.sizes.get("batch", 1) for layer in layers), default=1)


def _layers(path: Path, manifest: dict[str, Any], batch: int | None) -> BundleLayers:
    try:
        table = manifest.get("layers") or []
        stacked = [int(layer.get("settings", {}).get("num_layers", 1)) for layer in table[: MAX_LAYERS + 1]]
        if len(table) > MAX_LAYERS or max(stacked, default=1) > MAX_STACKED:
            raise ValueError("more layers than a model has")
        layers = partition(manifest, batch)
        wrong = [layer.name for layer in layers if not _plausible(layer)]
        if wrong:
            raise ValueError(f"sizes of {wrong[0]!r}")
        return BundleLayers(" ".join(str(manifest.get("name") or path.name).split()), layers)
    except _DAMAGED as error:
        raise ProfileError(f"{path}: its layer table is damaged ({_short(error)}); export the bundle again") from error


def _plausible(layer: LayerSpec) -> bool:
    numbers = [*layer.sizes.values(), layer.calls]
    words = isinstance(layer.name, str) and layer.kind.isprintable() and layer.name.isprintable()
    return words and all(isinstance(number, int) and 1 <= number <= MAX_SIZE for number in numbers)


def _manifest(path: Path) -> dict[str, Any]:
    data = _read(path, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is no bundle ({_short(error)}); {_CURE}") from error
    if not isinstance(manifest, dict):
        raise ProfileError(f"{path}: is no bundle; {_CURE}")
    return manifest


def _read(path: Path, name: str, limit: int) -> bytes:
    """One file of a bundle, never more than ``limit`` bytes of it."""
    try:
        if path.is_dir():
            with (path / name).open("rb") as file:
                data = file.read(limit + 1)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(name) as member:
                data = member.read(limit + 1)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror or error}); {_CURE}") from error
    except (KeyError, RuntimeError, *NO_ZIP) as error:
        raise ProfileError(f"{path}: is no bundle ({_short(error)}); {_CURE}") from error
    except MemoryError as error:
        raise ProfileError(f"{path}: its {name} needs more memory than there is") from error
    if len(data) > limit:
        raise ProfileError(f"{path}: its {name} is too large; {_CURE}")
    return data


def _short(error: Exception) -> str:
    """What is wrong in a few words for a user: no names of Python's errors, no pages that they may quote."""
    if isinstance(error, KeyError):
        words = str(error.args[0]) if error.args else "a field"
        return words[:200] if " " in words else f"there is no {words[:60]!r} in it"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, (AttributeError, TypeError, IndexError)):
        return "a field is of the wrong type"
    if isinstance(error, ArithmeticError):
        return "a number is out of range"
    words = " ".join(str(error).split())[:200]
    return "a field is not the number that it should be" if words.startswith(_NO_NUMBER) else words or "damaged"
