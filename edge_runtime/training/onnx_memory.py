"""The memory that graphs read and write in place: sets of weights, one batch, a gradient taken elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.training.onnx_graph import scalar, shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.bundle.manifest import Manifest
    from edge_runtime.compression.base import Layout
    from edge_runtime.training.base import Vector
    from edge_runtime.training.onnx_graph import OnnxGraph


class Side:
    """One set of everything that a step changes; ``vector`` is what travels, in layout order."""

    def __init__(
        self, manifest: Manifest, layout: Layout, private: Mapping[str, NDArray[Any]], *, slots: bool = True
    ) -> None:
        self.vector = np.zeros(layout.size, np.float32)
        self.frozen: Mapping[str, NDArray[Any]] = {}  # kept alive for onnxruntime
        kept = manifest.optimizer.slots if slots else []
        self._slots = np.zeros(sum(math.prod(slot.shape) for slot in kept), np.float32)
        self._private = [(np.array(tensor), tensor) for tensor in private.values()]
        self.values = {f"p.{name}": shared(view) for name, view in layout.split(self.vector).items()}
        for name, (own, _) in zip(private, self._private, strict=True):
            self.values[f"p.{name}"] = shared(own)
        at = 0
        for slot in kept:
            end = at + math.prod(slot.shape)
            self.values[f"s.{slot.name}"] = shared(self._slots[at:end].reshape(slot.shape))
            at = end

    def reset(self, weights: Vector) -> None:
        """Takes these weights, and what training starts with beside them."""
        self.vector[:] = weights
        self._slots[:] = 0
        for own, initial in self._private:
            own[...] = initial


def make_sides(
    manifest: Manifest, layout: Layout, tensors: Mapping[str, NDArray[Any]], *, slots: bool = True
) -> list[Side]:
    """Two of them. Frozen tensors are shared, since no step writes them; buffers that do not travel start anew in every
    job.
    """
    private = {e.name: tensors[e.name] for e in manifest.parameters if e.buffer and e.name not in layout.names}
    frozen = {e.name: np.array(tensors[e.name]) for e in manifest.parameters if not (e.buffer or e.trainable)}
    sides = [Side(manifest, layout, private, slots=slots) for _ in range(2)]
    for side in sides:
        side.frozen = frozen
        side.values.update({f"p.{name}": shared(tensor) for name, tensor in frozen.items()})
    return sides


class BatchMemory:
    """Memory for one batch; smaller batches use its beginning."""

    def __init__(self, manifest: Manifest, size: int) -> None:
        self._names = (manifest.inputs[0].name, manifest.target.name) if manifest.inputs else ("x", "y")
        self.size = size
        self.x = np.zeros((size, *manifest.inputs[0].shape), manifest.inputs[0].dtype)
        self.y = np.zeros((size, *manifest.target.shape), manifest.target.dtype)
        self.mask = np.zeros(size, np.float32)

    def values(self, size: int) -> dict[str, Any]:
        """What graphs see of it, for a batch of this size."""
        x, y = self._names
        return {x: shared(self.x[:size]), y: shared(self.y[:size]), "mask": shared(self.mask[:size])}


class Elsewhere:
    """Weights at which a second gradient of a batch is taken, apart from those that training goes on with."""

    def __init__(self, manifest: Manifest, layout: Layout, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._source, self._target = make_sides(manifest, layout, tensors, slots=False)
        self._gradient = np.zeros(layout.size, np.float32)
        self._results = {name: shared(scalar(np.float32)) for name in ("loss", "loss_sum", "correct", "count")}
        self._results |= {f"g.{name}": shared(view) for name, view in layout.split(self._gradient).items()}
        self._results |= {f"new.{name}": value for name, value in self._target.values.items()}
        self._batch: BatchMemory | None = None
        self._bindings: dict[int, Any] = {}

    def gradient(
        self, graph: OnnxGraph, weights: Vector, scalars: Mapping[str, Any], batch: BatchMemory, size: int
    ) -> Vector:
        """Of the batch in memory, of this size, float32 ``[layout.size]`` in new memory, zero for buffers."""
        if batch is not self._batch:
            self._batch = batch
            self._bindings.clear()
        if size not in self._bindings:
            inputs = {**scalars, **batch.values(size), **self._source.values}
            self._bindings[size] = graph.bind(inputs, self._results)
        self._source.reset(weights)
        graph.run(self._bindings[size])
        taken: Vector = self._gradient.copy()
        return taken


class Losses:
    """The losses of batches, weighted by their samples."""

    def __init__(self) -> None:
        self.samples, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, loss: float, samples: int) -> None:
        """One batch."""
        self.samples += samples
        self._sum += loss * samples
        self._squares += loss * loss * samples

    @property
    def mean(self) -> float:
        """Over all samples."""
        return self._sum / self.samples

    @property
    def rms(self) -> float:
        """Root of the mean of the squares."""
        return math.sqrt(self._squares / self.samples)
