"""Probe packs: every layer of some bundles as a training step of its own, for ``edge-energy profile`` on a device.

A device has no torch, and the forms of the graphs depend on the sizes (paddings and groups are attributes), so a pack
holds one small graph per configuration, traced by the code that traces whole bundles. Beside the layers themselves
(role ``layer``) there are other configurations of the same kinds (role ``candidate``), so that layers of models not
yet made can be predicted, tensors that an optimiser updates, and a graph that does nothing (role ``empty``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import random
import zipfile
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from edge_runtime.bundle import Bundle
from energy.thor import pack
from energy.thor.layers import DEFAULT_BATCH, base_kind, elementary, partition, spec_of
from exporters._archive import write_archive
from exporters._probe_graphs import ProbeGraph, empty_graph, layer_graph, optimizer_graph
from exporters._probe_layers import output_shape
from exporters._probe_sizes import draw, work
from exporters.errors import ExportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from energy.thor.layers import Entry, LayerSpec

_DISTRIBUTION = "edge-training-runtime"
_TRIES = 30
# A candidate may be this much more work than the largest layer of its kind, and no more.
_DEARER = 2.0
_NAMED = 4
_RECURRENT = 8  # configurations that are enough for a model of the kind

Key = tuple[str, tuple[tuple[str, int], ...]]


class PackReport(NamedTuple):
    """What a pack holds: probes per role and kind, and the kinds without one, with the layers that have them."""

    path: Path
    size_bytes: int
    layers: dict[str, int]
    candidates: dict[str, int]
    missing: dict[str, list[str]]


def export_probes(
    bundles: Sequence[Path],
    path: Path,
    *,
    per_kind: int = 40,
    seed: int = 0,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[str], None] | None = None,
) -> PackReport:
    """Makes a probe pack for the layers of some bundles.

    Args:
        bundles: whose layers are probed.
        path: the pack to write.
        per_kind: other configurations for each kind of layer.
        seed: of their sizes; the same bundles and seed give the same bytes.
        batch: samples per step, suggested to the device; graphs take any size where the layer allows it.
        progress: called with one line for each kind.

    Raises:
        UsageError: no bundle, a negative number, or a bundle without a layer table that says enough.
        BundleError: a bundle cannot be read.
    """
    if per_kind < 0:
        raise UsageError(f"--per-kind is {per_kind}; it must be 0 or more")
    if not bundles:
        raise UsageError("name at least one bundle whose layers are to be probed")
    made = _Pack(batch, progress or (lambda _line: None))
    for bundle in bundles:
        made.add_model(bundle)
    made.trace_layers()
    made.trace_candidates(per_kind, seed)
    size = made.write(path)
    return PackReport(path, size, made.count("layer"), made.count("candidate"), made.missing)


def _key(spec: LayerSpec) -> Key:
    return spec.kind, tuple(sorted(spec.sizes.items()))


class _Pack:
    """A pack under construction. Sizes are those for a batch of one, which are the sizes without the batch."""

    def __init__(self, batch: int, say: Callable[[str], None]) -> None:
        self._batch = batch
        self._say = say
        self._models: list[pack.PackedModel] = []
        self._entries: dict[str, dict[Key, Entry]] = {}  # distinct layers by kind
        self._owners: dict[Key, list[str]] = {}
        self._files: dict[str, bytes] = {"empty.onnx": empty_graph().to_bytes("empty")}
        self._probes = [pack.Probe(file="empty.onnx", role="empty")]
        self.missing: dict[str, list[str]] = {}

    def add_model(self, path: Path) -> None:
        if not path.exists():
            raise UsageError(f"{path} does not exist; name a bundle of edge-export bundle")
        bundle = Bundle.open(path)
        manifest = msgspec.to_builtins(bundle.manifest)
        name = bundle.manifest.name
        if not bundle.manifest.layers or not _has_settings(bundle):
            raise UsageError(f"{path}: its layer table does not say enough to probe layers; export the bundle again")
        specs = partition({**manifest, "batch": {}}, 1)
        layers = [pack.PackedLayer(spec.kind, spec.sizes, spec.calls) for spec in specs]
        self._models.append(pack.PackedModel(name=name, layers=layers))
        entries = {spec_of(entry, 1).name: entry for layer in manifest["layers"] for entry in elementary(layer)}
        for spec in specs:
            entry = entries.get(spec.name, {"kind": spec.kind, "sizes": spec.sizes})
            self._entries.setdefault(spec.kind, {}).setdefault(_key(spec), entry)
            self._owners.setdefault(_key(spec), []).append(f"{name}: {spec.name}")

    def trace_layers(self) -> None:
        for kind, entries in sorted(self._entries.items()):
            self._say(f"tracing {len(entries)} layers of kind {kind}")
            for key, entry in entries.items():
                graph = self._graph(kind, entry)
                if graph is None:
                    self.missing.setdefault(kind, []).extend(self._owners[key])
                else:
                    self._add("layer", key, graph, self._owners[key][:_NAMED])

    def trace_candidates(self, per_kind: int, seed: int) -> None:
        for kind, entries in sorted(self._entries.items()):
            if kind in self.missing or per_kind < 1:
                continue
            self._say(f"tracing up to {per_kind} other configurations of kind {kind}")
            rng = random.Random(f"{seed} {kind}")
            if kind.startswith("optimizer-"):
                drawn = self._optimizers(kind, [key[1][0][1] if key[1] else 1 for key in entries], per_kind, rng)
            else:
                # Of a recurrent layer every step is traced, which takes seconds.
                count = (
                    min(per_kind, max(_RECURRENT, per_kind // 2))
                    if base_kind(kind) in {"lstm", "gru", "rnn"}
                    else per_kind
                )
                drawn = self._others(kind, list(entries.values()), count, rng)
            for key, graph in drawn.items():
                self._add("candidate", key, graph, [])

    def _graph(self, kind: str, entry: Entry) -> ProbeGraph | None:
        if kind.startswith("optimizer-"):
            return optimizer_graph(kind.removeprefix("optimizer-"), int(entry["sizes"]["elements"]))
        try:
            return layer_graph(entry, self._batch)
        except ExportError as error:
            self._say(f"no probe for {entry['name']}: {error}")
            return None

    def _others(self, kind: str, entries: list[Entry], count: int, rng: random.Random) -> dict[Key, ProbeGraph]:
        most = _DEARER * max(work(entry) for entry in entries)
        made: dict[Key, ProbeGraph] = {}
        for _ in range(_TRIES * count):
            if len(made) == count:
                break
            entry = draw(rng.choice(entries), rng)
            shape = output_shape(entry)
            if shape is None:
                continue
            entry = {**entry, "output_shape": shape}
            spec = spec_of(entry, 1)
            key = _key(spec)
            if spec.kind != kind or key in self._owners or key in made or work(entry) > most:
                continue
            graph = self._graph(kind, entry)
            if graph is not None:
                made[key] = graph
        return made

    def _optimizers(self, kind: str, elements: list[int], count: int, rng: random.Random) -> dict[Key, ProbeGraph]:
        low, high = math.log(min(elements) / _DEARER), math.log(max(elements) * _DEARER)
        made: dict[Key, ProbeGraph] = {}
        for _ in range(_TRIES * count):
            size = max(1, round(math.exp(rng.uniform(low, high))))
            key = (kind, (("elements", size),))
            if key not in self._owners and key not in made and len(made) < count:
                made[key] = optimizer_graph(kind.removeprefix("optimizer-"), size)
        return made

    def _add(self, role: pack.Role, key: Key, graph: ProbeGraph, owners: list[str]) -> None:
        file = f"{key[0]}-{len(self._files)}.onnx"
        self._files[file] = graph.builder.to_bytes(key[0])
        probe = pack.Probe(
            file=file,
            role=role,
            kind=key[0],
            sizes=dict(key[1]),
            runs=graph.runs,
            batch=graph.batch,
            limits=graph.limits,
            layers=owners,
        )
        self._probes.append(probe)

    def count(self, role: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for probe in self._probes:
            if probe.role == role:
                found[probe.kind] = found.get(probe.kind, 0) + 1
        return found

    def write(self, path: Path) -> int:
        table = pack.Table(
            files={
                name: pack.FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
                for name, data in self._files.items()
            },
            probes=self._probes,
            models=self._models,
            missing=self.missing,
            batch=self._batch,
            created_by=f"edge-export {importlib.metadata.version(_DISTRIBUTION)}, torch {torch.__version__}",
        )
        text = msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n"
        return write_archive(path, {pack.PACK_NAME: text, **self._files}, zipfile.ZIP_DEFLATED)


def _has_settings(bundle: Bundle) -> bool:
    """Whether the layer table was written with settings: some entry has one, or the loss is in it."""
    manifest = bundle.manifest
    return any(layer.settings or layer.kind == manifest.task.loss for layer in manifest.layers)
