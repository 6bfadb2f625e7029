"""What a virtual device's training gives: by the device's own job runner in tasks of an executor, or an echo without.

Results belong to the virtual moment at which training ends, whenever the task ends, so nothing depends on the order
in which processes finish.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import time
from collections import OrderedDict
from concurrent.futures import CancelledError
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np

from coordinator.errors import ExecutorError
from coordinator.simulation.data import FACTORY, Share, packed
from edge_runtime.agent.pipe import RefusedUpdate, TrainRequest
from edge_runtime.data.config import DatasetConfig
from edge_runtime.messages import BlobRef, Job, ModelRef, UpdateId, UpdateMeta

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from coordinator.evaluation import TestSet
    from coordinator.executors.base import Executor, Shared
    from coordinator.plan import Plan
    from coordinator.simulation.data import Shares
    from edge_runtime.bundle import Bundle
    from edge_runtime.messages import Evaluation
    from edge_runtime.store.blobs import BlobStore
    from edge_runtime.training.job import JobRunner

_MODELS_SHARED = 32
_ATTEMPTS = 3  # of a task whose process died
_DEVICES_A_TASK = 32  # that are evaluated
_EVALUATION_BATCH = 256
_MEASURED_STEPS, _MEASURED_BATCHES = 40, 8
_VIEWS_KEPT = 512  # datasets of virtual devices that a process keeps open and checked


class Refused(NamedTuple):
    """An update that was refused, to be taken back."""

    update: UpdateId
    data: bytes
    key: str


class Order(NamedTuple):
    """Work for one virtual device. ``model`` is the whole model of the job's version.

    ``state`` is what its codec and method kept (empty: nothing). With ``stop_after`` training ends after so many steps,
    for the reason ``stopped``. ``deliver`` is where the update's bytes are to be left; empty: they are sent back.
    """

    device: str
    number: int
    job: Job
    model: BlobRef
    samples: int
    steps: int
    state: bytes = b""
    refused: tuple[Refused, ...] = ()
    stop_after: int | None = None
    stopped: str = ""
    deliver: str = ""


class TrainedUpdate(NamedTuple):
    """The result: update, what it says, and what the device keeps; see :class:`edge_runtime.agent.pipe.Trained`."""

    data: bytes | Path
    meta: UpdateMeta
    sha256: str
    size_bytes: int
    state: bytes = b""
    key: str = ""
    returned: tuple[UpdateId, ...] = ()


def content(data: bytes | Path) -> bytes:
    """The bytes of an update."""
    return data.read_bytes() if isinstance(data, Path) else data


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


# In the process of a task

_runner: list[JobRunner] = []


def train(bundle: Shared, model: Shared, arrays: tuple[Shared, ...], order: Order) -> TrainedUpdate:
    """The task: one job, as the device's worker does it. Everything that it writes is read back and deleted."""
    folder = _work_folder(bundle)
    files: list[Path] = []
    state_path = _written(files, folder / "before.state", order.state)
    refused = [
        RefusedUpdate(update=entry.update, path=_written(files, folder / f"{at}.refused", entry.data), key=entry.key)
        for at, entry in enumerate(order.refused)
    ]
    request = _request(bundle, model, arrays, order, folder)
    request = msgspec.structs.replace(request, state_path=state_path, refused=refused)
    steps = [0]

    def count(step: int, _total: int, _loss: float) -> None:
        steps[0] = step

    def stop() -> str:
        return order.stopped if order.stop_after is not None and steps[0] >= order.stop_after else ""

    try:
        done = _job_runner().run(request, count, stop=None if order.stop_after is None else stop)
        files += [Path(path) for path in (done.path, done.state_path) if path]
        data: bytes | Path = b""
        if done.path and order.deliver:
            data = Path(shutil.move(done.path, order.deliver))
        elif done.path:
            data = Path(done.path).read_bytes()
        state = Path(done.state_path).read_bytes() if done.state_path else b""
        digest = done.sha256 if done.path else hashlib.sha256(b"").hexdigest()
        return TrainedUpdate(
            data, done.meta, digest, done.size_bytes, state=state, key=done.key, returned=tuple(done.returned)
        )
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def evaluate_shares(
    bundle: Shared, model: Shared, arrays: tuple[Shared, ...], blobs: tuple[BlobRef, BlobRef], numbers: list[int]
) -> list[Evaluation | None]:
    """The task: a whole model on all data of each of these devices; ``blobs`` are those of bundle and model."""
    job = Job(
        run="evaluation",
        assignment="all",
        round=0,
        model_version=0,
        bundle=blobs[0],
        model=ModelRef(blobs=[blobs[1]]),
        dataset="all",
        deadline_s=1.0,
        batch_size=_EVALUATION_BATCH,
    )
    folder, found = _work_folder(bundle), []
    for number in numbers:
        order = Order(f"device-{number}", number, job, blobs[1], 0, 0)
        found.append(_job_runner().run(_request(bundle, model, arrays, order, folder)).meta.evaluation)
    return found


def evaluate_test_set(bundle: Shared, model: Shared, test_set: Shared) -> Evaluation:
    """The task: a model on the plan's test set, as the server evaluates it."""
    from edge_runtime.compression.pipeline import decode_model

    opened = _test_set(str(test_set.path()), str(bundle.path()))
    layout = _bundle(str(bundle.path())).layout()
    return opened.evaluate(decode_model(model.path().read_bytes(), layout))


@lru_cache(maxsize=2)
def _bundle(path: str) -> Bundle:
    from edge_runtime.bundle import Bundle

    return Bundle.open(Path(path))


@lru_cache(maxsize=2)
def _test_set(path: str, bundle: str) -> TestSet:
    from coordinator.evaluation import TestSet

    return TestSet(Path(path), _bundle(bundle))


def _request(bundle: Shared, model: Shared, arrays: tuple[Shared, ...], order: Order, folder: Path) -> TrainRequest:
    job = order.job
    whole, paths = ModelRef(blobs=[order.model], vector_sha256=job.model.vector_sha256), [str(model.path())]
    if job.model.vector_sha256 is not None and job.model_version == 0:  # no blob: everybody makes it from the bundle
        whole, paths = ModelRef(base=0, vector_sha256=job.model.vector_sha256), []
    places = {name: str(array.path()) for name, array in zip(("x", "y", "rows", "starts"), arrays, strict=True)}
    options: dict[str, Any] = {**places, "device": order.number}
    return TrainRequest(
        job=msgspec.structs.replace(job, model=whole),
        device=order.device,
        bundle_path=str(bundle.path()),
        model_paths=paths,
        output_folder=str(folder),
        dataset=DatasetConfig(name=job.dataset, factory=FACTORY, options=options),
    )


def _work_folder(bundle: Shared) -> Path:
    """Beside the shared files, so that it goes with them."""
    folder = bundle.path().parent / f"work-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _written(files: list[Path], path: Path, data: bytes) -> str:
    if not data:
        return ""
    path.write_bytes(data)
    files.append(path)
    return str(path)


def _job_runner() -> JobRunner:
    from edge_runtime.training.job import JobRunner

    if not _runner:
        _runner.append(JobRunner(bundles=2, datasets=_VIEWS_KEPT))
    return _runner[0]
