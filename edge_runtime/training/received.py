"""The model that a job starts from, out of what arrived and what the device holds."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.container import size_limit, unpack
from edge_runtime.compression.grid import SNAPSHOT, SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, decode, decode_model, encode_model
from edge_runtime.errors import CodecError, StorageError
from edge_runtime.store.models import HeldModels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edge_runtime.agent.pipe import TrainRequest
    from edge_runtime.bundle import Bundle
    from edge_runtime.compression.base import Layout
    from edge_runtime.training.base import Vector


class Received(NamedTuple):
    """``vector``: float32 ``[layout.size]``, read-only. ``shared``: the same on the run's grid, if the run has one.

    ``beside`` is what came with the model, by channel, as read-only vectors of its size; ``layout`` is of them all.
    """

    vector: Vector
    layout: Layout
    shared: SharedModel | None = None
    beside: Mapping[str, Vector] = {}


def receive(
    request: TrainRequest, bundle: Bundle, layout: Layout, channels: Sequence[str] = (MODEL_CHANNEL,)
) -> Received:
    """The job's model: the one blob that holds it, or the held version with all changes since.

    ``channels`` are those that the job's method wants; only a whole model comes with more than itself.

    Raises:
        CodecError: a blob is damaged or of another model, or something else came out than the job says.
        StorageError: a file is gone or cannot be read.
        BundleError: the initial parameters cannot be read.
    """
    model = request.job.model
    paths = [Path(path) for path in request.model_paths]
    if model.vector_sha256 is None:
        layouts = dict.fromkeys(channels, layout)
        with _naming(paths[0]):
            vectors = {name: part.vector() for name, part in decode(_read(paths[0], layouts), layouts).items()}
        for vector in vectors.values():
            vector.flags.writeable = False
        return Received(vectors.pop(MODEL_CHANNEL), layout, beside=vectors)
    if len(channels) > 1:
        raise CodecError(f"the method wants {', '.join(channels)}, and a lossy downlink carries the model alone")
    if model.base is None:
        with _naming(paths[0]):
            shared = SharedModel.decode(_read(paths[0], {MODEL_CHANNEL: layout}), layout)
    else:
        shared = _held(request, model.base, bundle, layout)
        for version, path in enumerate(paths, model.base):
            with _naming(path):
                layouts = {MODEL_CHANNEL: layout}
                data = _read(path, layouts)
                change = decode(data, layouts, base_version=version, reference=shared.vector)
                shared = shared.plus(change[MODEL_CHANNEL].vector())
    if shared.sha256() != model.vector_sha256:
        start = "a snapshot" if model.base is None else f"version {model.base} and {len(paths)} changes"
        raise CodecError(
            f"model version {request.job.model_version}, made from {start}, has another hash than the coordinator's"
        )
    shared.vector.flags.writeable = False
    return Received(shared.vector, layout, shared)


def hold(request: TrainRequest, received: Received, *, predicts: bool = False) -> int:
    """Keeps the job's version, for the next job to start from; gives the bytes that were written.

    Args:
        request: of the job.
        received: its model.
        predicts: the update cannot be decoded without the model, so that it is kept in any case, and durably.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    job, model = request.job, request.job.model
    if not request.models_folder or (received.shared is None and not predicts):
        return 0
    if received.shared is not None and job.model_version == 0:  # made from the bundle whenever it is needed
        return 0
    held = HeldModels(Path(request.models_folder))
    written = 0
    if received.shared is None or model.base != job.model_version:
        source: bytes | Path = Path(request.model_paths[0])
        if received.beside:
            source = encode_model(received.vector, received.layout)
        elif received.shared and model.base is not None:
            source = received.shared.encode()
        written = held.keep(job.run, job.model_version, source, base=model.base, pinned=request.pinned)
    if predicts:
        held.make_durable(job.run, job.model_version)
    return written


def reference(request: TrainRequest, version: int, sha256: str, bundle: Bundle, layout: Layout) -> Vector:
    """The model of an earlier job of this run, from which its update was predicted, float32 ``[layout.size]``.

    Args:
        request: of the job now.
        version: of the earlier job's model.
        sha256: of its vector (:func:`vector_sha256`). Only then does the update decode to what it held.
        bundle: of both jobs.
        layout: of the vector.

    Raises:
        CodecError: what is held is damaged or another model.
        StorageError: it is not held any more.
        BundleError: the initial parameters cannot be read.
    """
    path = HeldModels(Path(request.models_folder)).path(request.job.run, version)
    if request.models_folder and path.is_file():
        with _naming(path):
            data = _read(path, {MODEL_CHANNEL: layout})
            is_snapshot = unpack(data, {MODEL_CHANNEL: layout})[0].codec == SNAPSHOT
            vector = SharedModel.decode(data, layout).vector if is_snapshot else decode_model(data, layout)
    else:
        vector = _held(request, version, bundle, layout).vector
    if vector_sha256(vector) != sha256:  # as version 0 of a run without a shared model, which is not the bundle's
        raise CodecError(f"model version {version} of run {request.job.run!r} is not here as it was then")
    return vector


def vector_sha256(vector: Vector) -> str:
    """Hash of the little-endian float32 values, as a job names that of a shared model."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").data.cast("B")).hexdigest()


def _held(request: TrainRequest, version: int, bundle: Bundle, layout: Layout) -> SharedModel:
    if version == 0:
        return SharedModel.start(bundle.initial_vector(), layout)
    run, held = request.job.run, HeldModels(Path(request.models_folder))
    if not request.models_folder or not held.has(run, version):
        raise StorageError(f"model version {version} of run {run!r} is not on this device")
    path = held.path(run, version)
    try:
        with _naming(path):
            return SharedModel.decode(_read(path, {MODEL_CHANNEL: layout}), layout)
    except CodecError:
        held.drop(run, version)
        raise


def _read(path: Path, layouts: Mapping[str, Layout]) -> bytes:
    try:
        size = path.stat().st_size
        if size > size_limit(layouts):
            raise CodecError(f"{size} bytes are more than a model of {layouts[MODEL_CHANNEL].size} numbers can take")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with its content."""
    try:
        yield
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error
