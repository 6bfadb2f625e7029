"""One job from request to update: read the model, evaluate, train, encode, write durably."""

from __future__ import annotations

import errno
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edge_runtime.agent.pipe import Trained
from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import check_spec
from edge_runtime.data import open_dataset
from edge_runtime.data.view import View, Window
from edge_runtime.errors import BundleError, CodecError, DataError, EdgeError, StorageError, TrainingError
from edge_runtime.messages import Evaluation, Job, UpdateMeta
from edge_runtime.methods import ClientMethod, create_method
from edge_runtime.training.base import TrainResult, TrainSettings
from edge_runtime.training.onnx_trainer import OnnxTrainer
from edge_runtime.training.outgoing import spec_of, write_update
from edge_runtime.training.received import hold, receive
from edge_runtime.training.schedule import job_seed
from edge_runtime.training.state import codec_key, load_state

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from edge_runtime.agent.pipe import FailureKind, Phase, TrainRequest
    from edge_runtime.compression.base import Layout
    from edge_runtime.data import Dataset
    from edge_runtime.training.base import OnStep, Stop, Vector
    from edge_runtime.training.outgoing import Write
    from edge_runtime.training.received import Received
    from edge_runtime.training.state import RunState

_T = TypeVar("_T")


class JobRunner:
    """Does jobs one after the other and keeps what the next one can use: loaded bundles, opened and checked datasets.

    Not for several threads at a time.

    Args:
        bundles: how many loaded bundles to keep.
        datasets: how many opened datasets to keep.
        models: how many received models to keep by the names of their files; only for files that never change.
        write: writes an update or state to its file; None: durably.
        clock: unix time in seconds, for windows by age.
    """

    def __init__(
        self,
        *,
        bundles: int = 1,
        datasets: int = 2,
        models: int = 0,
        write: Write | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._loaded: OrderedDict[Hashable, _Loaded] = OrderedDict()
        self._datasets: OrderedDict[Hashable, Dataset] = OrderedDict()
        self._views: OrderedDict[Hashable, tuple[object, View]] = OrderedDict()
        self._models: OrderedDict[Hashable, Received] = OrderedDict()
        self._max_bundles, self._max_datasets, self._max_models = bundles, datasets, models
        self._write, self._clock = write, clock

    def run(
        self,
        request: TrainRequest,
        on_step: OnStep | None = None,
        *,
        on_phase: Callable[[Phase], None] | None = None,
        stop: Stop | None = None,
    ) -> Trained:
        """Does one job; ``on_step(step, steps_total, loss)`` is called after each step.

        ``on_phase`` is called when training begins, and when its result is to be encoded and written. ``stop`` is asked
        after every step: with a reason training ends there, and the update is made of what it reached.

        The update file holds a container with the channels of the job's method, laid out as ``Bundle.layout()``; beside
        it lies the run's state after this update, where there is any. A job without epochs and steps only evaluates:
        on the hold-out, or on all samples where nothing is held out.

        Raises:
            EdgeError: what went wrong, in one line; :func:`failure_kind` sorts it. Nothing is left behind.
        """
        job = request.job
        if job.cut is not None:
            raise TrainingError(f"the job asks for cut {job.cut!r}, but this software does not train split models")
        trains = job.role != "trainer" or job.epochs is not None or job.steps is not None
        method, spec = create_method(job.method, job.options), spec_of(request)
        declared = method.channels if job.role == "trainer" else method.roles.get(job.role)
        if declared is None:
            raise TrainingError(f"method {method.name!r} has no role {job.role!r}; only trainers can be asked")
        if trains:
            check_spec(spec)
        loaded = self._load(request, method.variant if job.variant is None else job.variant)
        samples, view = self._view(request, loaded)
        received = self._receive(request, loaded, method.down_channels)
        evaluation = None
        if job.evaluate or not trains:
            rows = view.holdout if job.holdout_fraction > 0 or trains else view.train
            evaluation = loaded.trainer.evaluate(received.vector, view, rows, job.batch_size)
        if not trains:
            meta = _meta(job, len(view.train), evaluation, written_bytes=hold(request, received))
            return Trained(path="", sha256="", size_bytes=0, meta=meta, dataset_samples=samples)
        state_path = Path(request.state_path) if request.state_path else None
        state = load_state(state_path, job.bundle.sha256, codec_key(job.bundle.sha256, spec))
        enter = on_phase or (lambda _phase: None)
        enter("train")
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        result, channels = _Training(request, loaded, method).run(view, received, state, on_step, stop)
        enter("compress")
        trained_s, trained_cpu_s = time.monotonic(), time.process_time()
        if channels.keys() != set(declared):
            raise TrainingError(f"method {method.name!r} sends {sorted(channels)}, but declares {sorted(declared)}")
        done = write_update(
            request, received, channels, state, loaded.bundle, trained=method.channels, write=self._write
        )
        meta = _meta(job, result.samples, evaluation, written_bytes=done.written_bytes)
        return Trained(
            path=done.path,
            sha256=done.sha256,
            size_bytes=done.size_bytes,
            meta=msgspec.structs.replace(
                meta,
                steps=result.steps,
                loss=result.loss,
                loss_rms=result.loss_rms,
                stopped=result.stopped,
                train_ms=round(1000 * result.train_s),
                encode_cpu_ms=round(1000 * done.encode_cpu_s),
            ),
            dataset_samples=samples,
            state_path=done.state_path,
            key=done.key,
            returned=[refused.update for refused in request.refused],
            train_s=trained_s - began_s,
            compress_s=time.monotonic() - trained_s,
            train_cpu_s=trained_cpu_s - began_cpu_s,
            compress_cpu_s=time.process_time() - trained_cpu_s,
        )

    def _load(self, request: TrainRequest, variant: str | None) -> _Loaded:
        key = (request.job.bundle.sha256, request.bundle_path, variant, request.threads)
        loaded = self._loaded.get(key)
        if loaded is None:
            while len(self._loaded) >= self._max_bundles:
                self._loaded.popitem(last=False)
            loaded = _Loaded(request, variant)
            self._loaded[key] = loaded
        self._loaded.move_to_end(key)
        return loaded

    def _receive(self, request: TrainRequest, loaded: _Loaded, channels: Sequence[str]) -> Received:
        if not self._max_models:
            return receive(request, loaded.bundle, loaded.layout, channels)
        model = request.job.model
        key = (request.job.bundle.sha256, model.vector_sha256, tuple(request.model_paths), tuple(channels))
        known = self._models.get(key)
        if known is None:
            known = receive(request, loaded.bundle, loaded.layout, channels)
        return _keep(self._models, key, known, self._max_models)

    def _view(self, request: TrainRequest, loaded: _Loaded) -> tuple[int, View]:
        job, config = request.job, request.dataset
        key = msgspec.json.encode(config)
        dataset = self._datasets.get(key)
        if dataset is None:
            dataset = _keep(self._datasets, key, open_dataset(config, code_dir=request.code_dir), self._max_datasets)
        try:
            snapshot = dataset.snapshot()
        except EdgeError:
            raise
        except Exception as error:  # the user's own dataset class
            text = " ".join(str(error).split())[:300]
            raise DataError(f"dataset {config.name!r}: snapshot failed: {type(error).__name__}: {text}") from error
        window = Window(job.holdout_fraction, job.max_samples, job.max_age_s)
        view_key = (key, window, job.bundle.sha256, request.bundle_path)
        known = self._views.get(view_key)
        if known is not None and known[0] is snapshot and job.max_age_s is None:
            return known[1].samples, known[1]
        view = View(config.name, snapshot, loaded.bundle.manifest, window, now_unix_s=self._clock())
        _keep(self._views, view_key, (snapshot, view), self._max_datasets)
        return view.samples, view


class _Loaded:
    def __init__(self, request: TrainRequest, variant: str | None) -> None:
        self.bundle = Bundle.open(request.bundle_path)
        expected = request.job.bundle.sha256
        if not self.bundle.path.is_dir() and self.bundle.sha256 != expected:
            raise BundleError(f"{self.bundle.path}: is not the bundle of the job ({expected[:12]}); fetch it again")
        self.layout = self.bundle.layout()
        self.trainer = OnnxTrainer(request.threads)
        self.trainer.load(self.bundle, variant)


def failure_kind(error: BaseException) -> FailureKind:
    """Which part a failed job is blamed on."""
    kinds: tuple[tuple[type[EdgeError], FailureKind], ...] = (
        (DataError, "data"),
        (BundleError, "bundle"),
        (TrainingError, "training"),
        (CodecError, "codec"),
        (StorageError, "storage"),
    )
    for kind, name in kinds:
        if isinstance(error, kind):
            return name
    return "storage" if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else "internal"


class _Training:
    """One method at work on one model."""

    def __init__(self, request: TrainRequest, loaded: _Loaded, method: ClientMethod) -> None:
        job = request.job
        self._method, self._layout, self._trainer = method, loaded.layout, loaded.trainer
        self._role = job.role
        self._settings = TrainSettings(
            epochs=job.epochs,
            steps=job.steps,
            batch_size=job.batch_size,
            last_batch=job.last_batch,
            hyper=job.hyper,
            seed=job_seed(job.seed, request.device, job.assignment, job.sequence),
        )
        self._personal = method.personal(loaded.layout)
        unknown = self._personal - set(loaded.layout.names)
        if unknown:
            raise TrainingError(f"method {method.name!r} keeps {min(unknown)!r} personal, which the model lacks")

    def run(
        self, view: View, job_model: Received, state: RunState, on_step: OnStep | None, stop: Stop | None
    ) -> tuple[TrainResult, dict[str, Vector]]:
        """Trains and updates the method's part of ``state``; personal tensors do not get into the channels."""
        method, layout, received = self._method, self._layout, job_model.vector
        method.on_channels(job_model.beside)
        if self._role == "anchor":
            at = _with_personal(received, layout, self._personal, state)
            result = self._trainer.full_gradient(at, view, self._settings, on_step=on_step, stop=stop)
            for name, part in layout.split(result.vector).items():
                if name in self._personal:
                    part[...] = 0
            return result, method.anchor(result.vector, layout, state.memory)
        start = method.on_receive(_with_personal(received, layout, self._personal, state), layout, state.memory)
        result = self._trainer.train(
            start,
            view,
            self._settings,
            gradient=method.gradient_hook(),
            sampler=method.sampler,
            on_step=on_step,
            stop=stop,
        )
        trained = result.vector
        if self._personal:
            trained = trained.copy()
            own, given = layout.split(trained), layout.split(received)
            state.personal = {name: own[name].copy() for name in sorted(self._personal)}
            for name in self._personal:
                own[name][...] = given[name]
        return result, method.on_finish(received, trained, layout, state.memory)


def _with_personal(received: Vector, layout: Layout, personal: frozenset[str], state: RunState) -> Vector:
    if not personal:
        return received
    start: Vector = received.copy()
    for name, tensor in layout.split(start).items():
        kept = state.personal.get(name)
        if name in personal and kept is not None and kept.shape == tensor.shape:
            tensor[...] = kept
    start.flags.writeable = False
    return start


def _meta(job: Job, samples: int, evaluation: Evaluation | None, *, written_bytes: int) -> UpdateMeta:
    return UpdateMeta(
        round=job.round,
        model_version=job.model_version,
        samples=samples,
        steps=0,
        written_bytes=written_bytes,
        evaluation=evaluation,
    )


def _keep(table: OrderedDict[Hashable, _T], key: Hashable, value: _T, limit: int) -> _T:
    """Puts a value in, and the oldest ones out."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > limit:
        table.popitem(last=False)
    return value
