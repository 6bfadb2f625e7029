"""Training and evaluation of virtual devices, in the process of a task: the device's job runner, files in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from coordinator.simulation.data import FACTORY
from edge_runtime.agent.pipe import RefusedUpdate, TrainRequest
from edge_runtime.data.config import DatasetConfig
from edge_runtime.messages import BlobRef, Job, ModelRef, UpdateId, UpdateMeta

if TYPE_CHECKING:
    from coordinator.evaluation import TestSet
    from coordinator.executors.base import Shared
    from edge_runtime.bundle import Bundle
    from edge_runtime.messages import Evaluation
    from edge_runtime.training.job import JobRunner

_EVALUATION_BATCH = 256
_VIEWS_KEPT = 512  # datasets of virtual devices that a process keeps open and checked
_MODELS_KEPT = 4  # versions that jobs start from, decoded
_runner: list[JobRunner] = []  # of this process


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


def prepare(bundle: Shared) -> None:
    """The task: loads what all others need, so that the run does not begin with that."""
    _job_runner()
    _bundle(str(bundle.path()))


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
    return _folder(bundle.path(), os.getpid())


@lru_cache(maxsize=2)
def _folder(bundle: Path, process: int) -> Path:
    folder = bundle.parent / f"work-{process}"
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
        _runner.append(JobRunner(bundles=2, datasets=_VIEWS_KEPT, models=_MODELS_KEPT, write=Path.write_bytes))
    return _runner[0]
