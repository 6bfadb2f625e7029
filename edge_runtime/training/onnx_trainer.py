"""Training with stock onnxruntime: two sets of weights that one step reads and the next one writes."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edge_runtime.errors import DataError, TrainingError
from edge_runtime.messages import Evaluation
from edge_runtime.training.base import TrainResult
from edge_runtime.training.onnx_graph import OnnxGraph, scalar, shared
from edge_runtime.training.onnx_memory import BatchMemory, Elsewhere, Losses, make_sides
from edge_runtime.training.randomness import Stream
from edge_runtime.training.schedule import BatchRule, batches, samples_of, total_steps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.bundle import Bundle
    from edge_runtime.data.view import View
    from edge_runtime.training.base import GradientHook, OnStep, Sampler, Stop, TrainSettings, Vector

_LARGEST = float(np.finfo(np.float32).max)
_MAX_BINDINGS = 4  # batch sizes that stay bound: the usual one and a partial one, twice


class OnnxTrainer:
    """The :class:`~edge_runtime.training.base.Trainer` of ``.onnx`` graphs; one thread by default, never spinning."""

    name: ClassVar[str] = "onnx"

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._graphs: dict[str, OnnxGraph] = {}
        self._bindings: dict[tuple[str, int], list[Any]] = {}

    def load(self, bundle: Bundle, variant: str | None = None) -> None:
        """See :class:`~edge_runtime.training.base.Trainer`; keeps the tensors, not the bundle's bytes."""
        self._bundle, self._variant = bundle, variant
        manifest = self._manifest = bundle.manifest
        self._graphs.clear()
        self._bindings.clear()
        self._sides = make_sides(manifest, bundle.layout(), bundle.initial_tensors())
        self._elsewhere: Elsewhere | None = None
        self._gradient = np.zeros_like(self._sides[0].vector)
        views = bundle.layout().split(self._gradient)
        self._gradients = {f"g.{name}": shared(view) for name, view in views.items()}
        self._buffer_gradients = [views[e.name] for e in manifest.parameters if e.buffer and e.name in views]
        self._scalars = {name: scalar(np.float32, value) for name, value in manifest.optimizer.hyper.items()}
        self._scalars["seed"] = scalar(np.int64)
        self._results = {name: scalar(np.float32) for name in ("loss", "loss_sum", "correct", "count")}
        self._batch = BatchMemory(manifest, 0)

    def train(
        self,
        start: Vector,
        view: View,
        settings: TrainSettings,
        *,
        gradient: GradientHook | None = None,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
        stop: Stop | None = None,
    ) -> TrainResult:
        """See :class:`~edge_runtime.training.base.Trainer`."""
        began = time.monotonic()
        self._set_hyper(settings.hyper)
        names = ("train",) if gradient is None else ("gradients", "update")
        first = self._graph(names[0])
        rule, total = self._plan(first, view, settings)
        count = len(view.train)
        for side in self._sides:
            side.reset(start)
        dropout = Stream(settings.seed, "dropout")
        losses, step, stopped = Losses(), 0, ""
        for step, positions in enumerate(batches(count, settings, rule, sampler), 1):
            indices = view.train[positions]
            size = self._fill(first, view, indices, settings.batch_size)
            self._scalars["seed"][()] = dropout.integer(1 << 31)
            first.run(self._bound(names[0], size)[(step - 1) % 2])
            if gradient is not None:
                self._apply(gradient, (step - 1) % 2, size)
            value = self._loss(f"step {step} of {total}")
            losses.add(value, len(indices))
            if on_step is not None:
                on_step(step, total, value)
            if stop is not None and step < total and (stopped := stop()):
                break
        vector = self._sides[step % 2].vector
        if vector.size and not (math.isfinite(vector.min()) and math.isfinite(vector.max())):
            raise TrainingError(f"weights are NaN or infinite after step {step} of {total}; {self._cure()}")
        stands_for = samples_of(count, losses.samples, total, settings, rule) if stopped else count
        return TrainResult(vector, step, stands_for, losses.mean, time.monotonic() - began, stopped, losses.rms)

    def full_gradient(
        self,
        weights: Vector,
        view: View,
        settings: TrainSettings,
        *,
        on_step: OnStep | None = None,
        stop: Stop | None = None,
    ) -> TrainResult:
        """See :class:`~edge_runtime.training.base.Trainer`."""
        began = time.monotonic()
        settings = dataclasses.replace(settings, epochs=1, steps=None)
        self._set_hyper(settings.hyper)
        graph = self._graph("gradients")
        rule, total = self._plan(graph, view, settings)
        for side in self._sides:
            side.reset(weights)
        dropout = Stream(settings.seed, "dropout")
        self._gradient[:] = 0  # entries of buffers stay so
        sums, losses, stopped = np.zeros(len(weights), np.float64), Losses(), ""
        for number, positions in enumerate(batches(len(view.train), settings, rule), 1):
            indices = view.train[positions]
            size = self._fill(graph, view, indices, settings.batch_size)
            self._scalars["seed"][()] = dropout.integer(1 << 31)
            graph.run(self._bound("gradients", size)[0])
            value = self._loss(f"batch {number} of {total}")
            losses.add(value, len(indices))
            sums += np.multiply(self._gradient, len(indices), dtype=np.float64)
            if on_step is not None:
                on_step(number, total, value)
            if stop is not None and number < total and (stopped := stop()):
                break
        gradient = (sums / losses.samples).astype(np.float32)
        if not np.isfinite(gradient).all():
            raise TrainingError(f"the gradient is NaN or infinite; {self._cure()}")
        return TrainResult(gradient, 0, losses.samples, losses.mean, time.monotonic() - began, stopped, losses.rms)

    def evaluate(
        self, weights: Vector, view: View, indices: NDArray[np.integer[Any]], batch_size: int
    ) -> Evaluation | None:
        """See :class:`~edge_runtime.training.base.Trainer`. A fixed batch without mask leaves a partial batch out."""
        if len(indices) == 0:
            return None
        graph = self._graph("evaluate")
        size = graph.fixed_batch or batch_size
        self._sides[0].reset(weights)
        samples, loss_sum, correct = 0, 0.0, 0.0
        results = self._results
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            if len(chosen) < size and graph.fixed_batch is not None and not graph.has_mask:
                break
            bound = self._fill(graph, view, chosen, size)
            graph.run(self._bound("evaluate", bound)[0])
            samples += len(chosen)
            loss_sum += float(results["loss_sum"][()])
            correct += float(results["correct"][()])
        if samples == 0:
            return None
        if not math.isfinite(loss_sum):
            raise TrainingError(f"the received model gives a loss of {loss_sum} on {samples} samples; it has diverged")
        return Evaluation(
            samples=samples, loss_sum=loss_sum, correct=round(correct) if "correct" in graph.outputs else None
        )

    def _plan(self, graph: OnnxGraph, view: View, settings: TrainSettings) -> tuple[BatchRule, int]:
        """What makes a batch, and how many steps there will be."""
        self._check_batch(graph, settings.batch_size)
        fixed = graph.fixed_batch is not None and not graph.has_mask
        rule = BatchRule(settings.last_batch == "drop" or fixed, self._manifest.batch.minimum)
        try:
            return rule, total_steps(len(view.train), settings, rule)
        except DataError as error:
            raise DataError(f"dataset {view.name!r}: {error}") from error

    def _loss(self, where: str) -> float:
        value = float(self._results["loss"][()])
        if not math.isfinite(value):
            raise TrainingError(f"loss is {value} at {where}; {self._cure()}")
        return value

    def _apply(self, gradient: GradientHook, side: int, size: int) -> None:
        for view in self._buffer_gradients:
            view[...] = 0
        changed = gradient(self._gradient, self._sides[side].vector, lambda weights: self._gradient_at(weights, size))
        if changed is not self._gradient:
            self._gradient[:] = changed
        self._graph("update").run(self._bound("update", 0)[side])

    def _gradient_at(self, weights: Vector, size: int) -> Vector:
        """The gradient of the batch in memory at other weights; touches nothing that training goes on with."""
        if self._elsewhere is None:
            self._elsewhere = Elsewhere(self._manifest, self._bundle.layout(), self._bundle.initial_tensors())
        scalars = {key: shared(array) for key, array in self._scalars.items()}
        return self._elsewhere.gradient(self._graph("gradients"), weights, scalars, self._batch, size)

    def _graph(self, name: str) -> OnnxGraph:
        if name not in self._graphs:
            self._graphs[name] = OnnxGraph(self._bundle, name, self._variant, self._threads)
        return self._graphs[name]

    def _bound(self, name: str, size: int) -> list[Any]:
        """Bindings of a graph for one batch size (0: takes no batch): from side 0 to side 1, and back."""
        bindings = self._bindings.get((name, size))
        if bindings is None:
            if len(self._bindings) >= 2 * _MAX_BINDINGS:
                self._bindings.clear()
            common = {key: shared(array) for key, array in self._scalars.items()} | self._gradients
            common |= self._batch.values(size) if size else {}
            results = {key: shared(array) for key, array in self._results.items()} | self._gradients
            graph = self._graph(name)
            bindings = [
                graph.bind(common | source.values, results | {f"new.{key}": v for key, v in target.values.items()})
                for source, target in (self._sides, self._sides[::-1])
            ]
            self._bindings[name, size] = bindings
        return bindings

    def _fill(self, graph: OnnxGraph, view: View, indices: NDArray[np.integer[Any]], batch_size: int) -> int:
        """Reads samples into the batch memory; gives the size of the batch that the graph sees."""
        count = len(indices)
        needed = count if graph.fixed_batch is None else batch_size  # a job's batch size may be far above the data's
        if self._batch.size < needed:
            self._batch = BatchMemory(self._manifest, needed)
            self._bindings.clear()
        memory = self._batch
        view.read(indices, memory.x, memory.y)
        if graph.fixed_batch is None:
            memory.mask[:count] = 1
            return count
        memory.x[count:batch_size], memory.y[count:batch_size] = 0, 0
        memory.mask[:count], memory.mask[count:batch_size] = 1, 0
        return batch_size

    def _check_batch(self, graph: OnnxGraph, size: int) -> None:
        if graph.fixed_batch is not None and size != graph.fixed_batch:
            raise TrainingError(
                f"bundle {self._manifest.name!r} takes batches of {graph.fixed_batch} only, the job asks for "
                f"{size}; set batch_size = {graph.fixed_batch}"
            )

    def _set_hyper(self, hyper: Mapping[str, float]) -> None:
        defaults = self._manifest.optimizer.hyper
        for name, value in hyper.items():
            if name not in defaults:
                raise TrainingError(
                    f"bundle {self._manifest.name!r} has no hyper-parameter {name!r}; it has {', '.join(defaults)}"
                )
            if not abs(value) <= _LARGEST:
                raise TrainingError(f"hyper-parameter {name!r} is {value}; give a finite number")
        for name, value in defaults.items():
            self._scalars[name][()] = hyper.get(name, value)

    def _cure(self) -> str:
        rate = f" (now {float(self._scalars['lr'][()]):g})" if "lr" in self._scalars else ""
        return f"lower the learning rate{rate}, clip gradients, or look for outliers in the data"
