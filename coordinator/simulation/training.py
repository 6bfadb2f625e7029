"""What a virtual device's training gives: by the device's own job runner in tasks of an executor, or an echo without.

Results belong to the virtual moment at which training ends, whenever the task ends, so nothing depends on the order
in which processes finish.
"""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from concurrent.futures import CancelledError, wait
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from coordinator.errors import ExecutorError
from coordinator.simulation.data import Share, packed
from coordinator.simulation.tasks import evaluate_shares, evaluate_test_set, prepare, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from coordinator.executors.base import Executor, Shared
    from coordinator.plan import Plan
    from coordinator.simulation.data import Shares
    from coordinator.simulation.tasks import Order, TrainedUpdate
    from edge_runtime.messages import BlobRef, Evaluation
    from edge_runtime.store.blobs import BlobStore

_MODELS_SHARED = 32
_ATTEMPTS = 3  # of a task whose process died
_DEVICES_A_TASK = 32  # that are evaluated
_MEASURED_STEPS, _MEASURED_BATCHES = 40, 8


class Handle(Protocol):
    """Training that was begun."""

    def result(self) -> TrainedUpdate:
        """Waits for it; raises the EdgeError that ended it."""
        ...

    def cancel(self) -> None:
        """Nobody wants it any more."""
        ...


class Trainer(Protocol):
    """Trains virtual devices."""

    def start(self, order: Order) -> Handle:
        """Begins as soon as a process is free."""
        ...

    def close(self) -> None:
        """Forgets what it shared with processes."""
        ...


class RealTrainer:
    """Trains by :class:`edge_runtime.training.job.JobRunner` in tasks of an executor."""

    def __init__(self, executor: Executor, bundle: BlobRef, blobs: BlobStore, shares: Shares, folder: Path) -> None:
        self._executor, self._blobs, self._bundle_ref = executor, blobs, bundle
        arrays = (shares.data.x, shares.data.y, shares.rows, shares.starts)
        self._bundle = executor.share(blobs.path(bundle.sha256).read_bytes())
        self._arrays = tuple(executor.share(packed(array)) for array in arrays)
        self._models: OrderedDict[str, Shared] = OrderedDict()
        self._folder, self._number = folder, 0
        folder.mkdir(exist_ok=True)
        wait([executor.submit(prepare, self._bundle) for _ in range(executor.workers)])

    def start(self, order: Order) -> Handle:
        model = self.shared_model(order.model)
        if self._executor.local:
            self._number += 1
            order = order._replace(deliver=str(self._folder / str(self._number)))
        return _Running(lambda: self._executor.submit(train, self._bundle, model, self._arrays, order))

    def evaluate(self, model: BlobRef, test_set: Shared) -> Future[Evaluation]:
        """Begins to evaluate the server's model on a test set."""
        return self._executor.submit(evaluate_test_set, self._bundle, self.shared_model(model), test_set)

    def evaluate_devices(self, model: BlobRef, count: int) -> list[Evaluation | None]:
        """The server's model on all data of each of the first ``count`` devices; waits for it."""
        blob, shared = self._bundle_ref, self.shared_model(model)
        parts = [list(range(first, min(first + _DEVICES_A_TASK, count))) for first in range(0, count, _DEVICES_A_TASK)]
        futures = [
            self._executor.submit(evaluate_shares, self._bundle, shared, self._arrays, (blob, model), part)
            for part in parts
        ]
        return [evaluation for future in futures for evaluation in future.result()]

    def shared_model(self, blob: BlobRef) -> Shared:
        """The bytes of a model, shared once while it is in use."""
        known = self._models.get(blob.sha256)
        if known is None:
            while len(self._models) >= _MODELS_SHARED:
                self._executor.release(self._models.popitem(last=False)[1])
            known = self._models[blob.sha256] = self._executor.share(self._blobs.path(blob.sha256).read_bytes())
        self._models.move_to_end(blob.sha256)
        return known

    def close(self) -> None:
        for shared in (self._bundle, *self._arrays, *self._models.values()):
            self._executor.release(shared)
        self._models.clear()


class _Running:
    """A task; begun again if its process died, since it is the same whenever it runs."""

    def __init__(self, begin: Callable[[], Future[TrainedUpdate]]) -> None:
        self._begin = begin
        self._future = begin()

    def result(self) -> TrainedUpdate:
        for attempt in range(_ATTEMPTS):
            try:
                return self._future.result()
            except ExecutorError:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._future = self._begin()
        raise CancelledError

    def cancel(self) -> None:
        if not self._future.cancel():
            self._future.add_done_callback(_discard)


def measure_step_s(plan: Plan, shares: Shares) -> float:
    """Seconds of one training step on this machine: the median of some, with the plan's bundle and batch size.

    Raises:
        EdgeError: bundle and data do not fit one another.
    """
    from edge_runtime.bundle import Bundle
    from edge_runtime.data.view import View, Window
    from edge_runtime.training.base import TrainSettings
    from edge_runtime.training.onnx_trainer import OnnxTrainer

    bundle = Bundle.open(Path(plan.bundle))
    trainer = OnnxTrainer()
    trainer.load(bundle, plan.variant)
    share = Share(shares.data.x, shares.data.y, np.arange(len(shares.data.y)))
    view = View(plan.dataset, share, bundle.manifest, Window(max_samples=_MEASURED_BATCHES * plan.training.batch_size))
    settings = TrainSettings(
        epochs=None, steps=_MEASURED_STEPS, batch_size=plan.training.batch_size, hyper=plan.training.hyper
    )
    times_s: list[float] = []
    trainer.train(bundle.initial_vector(), view, settings, on_step=lambda *_: times_s.append(time.perf_counter()))
    return statistics.median(after - before for before, after in pairwise(times_s))


def _discard(future: Future[TrainedUpdate]) -> None:
    """Nobody wants what came out."""
    if not future.cancelled() and future.exception() is None and isinstance(future.result().data, Path):
        future.result().data.unlink(missing_ok=True)  # type: ignore[union-attr]
