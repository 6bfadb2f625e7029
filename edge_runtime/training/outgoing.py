"""What leaves a job: refused updates taken back, the update encoded, its bytes and the run's new state durable."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.compression.base import Codec
from edge_runtime.compression.container import size_limit, unpack, update_tag
from edge_runtime.compression.pipeline import CodecSpec, decode, encode, give_back, keeps_residual, predicts
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import CodecError, StorageError
from edge_runtime.files import remove, write_durably
from edge_runtime.messages import UpdateId
from edge_runtime.training.received import hold, reference, vector_sha256
from edge_runtime.training.schedule import job_seed
from edge_runtime.training.state import codec_key, encode_state

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import TypeAlias

    from edge_runtime.agent.pipe import RefusedUpdate, TrainRequest
    from edge_runtime.bundle import Bundle
    from edge_runtime.compression.base import Layout
    from edge_runtime.training.base import Vector
    from edge_runtime.training.received import Received
    from edge_runtime.training.state import RunState

    Write: TypeAlias = Callable[[Path, bytes | memoryview], object]

log = logging.getLogger("edge.worker")

_KEY_SEPARATOR = ":"  # between the codec's key and the hash of the model from which an update was predicted


class Written(NamedTuple):
    """The update's file, and the run's state after it (empty: there is none). ``key``: see the pipe's ``Trained``."""

    path: str
    sha256: str
    size_bytes: int
    state_path: str
    key: str
    encode_cpu_s: float
    written_bytes: int


def write_update(
    request: TrainRequest,
    received: Received,
    channels: Mapping[str, Vector],
    state: RunState,
    bundle: Bundle,
    *,
    trained: Collection[str],
    write: Write | None = None,
) -> Written:
    """Encodes an update and makes it and the state after it durable, as files that no row of the spool names yet.

    Args:
        request: of the job.
        received: model that the update is relative to; stays here for the next job.
        channels: float32 ``[layout.size]`` by channel.
        state: of the run before; afterwards, if nothing is raised, as it was written.
        bundle: of the job.
        trained: names of the channels that trainers of this method send, as refused updates did.
        write: writes a file; None: durably.

    Raises:
        CodecError: it cannot be encoded as the job wants.
        StorageError: the disk is full or cannot be written; no file is left.
    """
    job, spec = request.job, spec_of(request)
    layouts = dict.fromkeys(channels, bundle.layout())
    key = codec_key(job.bundle.sha256, spec)
    for refused in request.refused:
        _take_back(request, refused, key, dict.fromkeys(trained, bundle.layout()), state, bundle=bundle)
    steps = job.role == "trainer"  # other roles send what replaces what they sent before: nothing is left to add
    if not steps:
        spec = _without_memory(spec)
    began_s = time.process_time()
    encoded = encode(
        spec,
        channels,
        layouts,
        state.codec,
        budget_bytes=job.byte_budget,
        seed=job_seed(job.seed, request.device, job.assignment, job.sequence),
        base_version=job.model_version,
        tag=update_tag(UpdateId(job.run, request.device, job.assignment, job.sequence)),
        reference=received.vector,
    )
    encode_cpu_s = time.process_time() - began_s
    if steps:
        state.codec = encoded.state
    may_predict = codec_class(spec.name).decode_against is not Codec.decode_against
    predicted = may_predict and predicts(encoded.data, layouts)
    made_with = key + _KEY_SEPARATOR + _model_sha256(request, received) if predicted else key
    written = hold(request, received, predicts=predicted)
    stored = encode_state(state, job.bundle.sha256, key) if state else b""
    digest = hashlib.sha256(encoded.data).hexdigest()
    state_path, path = _write(request, stored, encoded.data, digest, write or write_durably)
    return Written(
        path=path,
        sha256=digest,
        size_bytes=len(encoded.data),
        state_path=state_path,
        key=made_with if keeps_residual(spec) else "",
        encode_cpu_s=encode_cpu_s,
        written_bytes=written + len(stored) + len(encoded.data),
    )


def spec_of(request: TrainRequest) -> CodecSpec:
    """The codec that a job asks for."""
    return CodecSpec(request.job.codec, request.job.codec_options)


def _without_memory(spec: CodecSpec) -> CodecSpec:
    """The codec without error feedback and momentum."""
    if codec_class(spec.name).lossless:
        return spec
    options = {name: value for name, value in spec.options.items() if name != "momentum"}
    return CodecSpec(spec.name, {**options, "error_feedback": False})


def _model_sha256(request: TrainRequest, received: Received) -> str:
    return request.job.model.vector_sha256 or vector_sha256(received.vector)


def _take_back(
    request: TrainRequest,
    refused: RefusedUpdate,
    key: str,
    layouts: Mapping[str, Layout],
    state: RunState,
    *,
    bundle: Bundle,
) -> None:
    """Adds what was refused to what the codec has not sent yet, unless it was made by another codec or bundle.

    What was predicted from a model that is gone from the disk, or is another one now, is dropped, and so is what was
    damaged where it lay: faults of the disk are the one case in which what was trained may be lost.
    """
    made_with, _, model_sha256 = refused.key.partition(_KEY_SEPARATOR)
    if made_with != key:
        log.info("update %s was refused and is dropped: codec or bundle changed since", refused.update)
        return
    try:
        data = _read(Path(refused.path), size_limit(layouts))
        header, _ = unpack(data, layouts)
        layout = next(iter(layouts.values()))
        model = None
        if predicts(data, layouts):
            model = reference(request, header.base_version, model_sha256, bundle, layout)
        updates = decode(data, layouts, tag=update_tag(refused.update), reference=model)
    except (CodecError, StorageError) as error:  # damaged where it lay: better to go on without
        log.warning("update %s was refused and cannot be sent again: %s", refused.update, error)
        return
    state.codec = give_back(spec_of(request), updates, layouts, state.codec)


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


def _write(request: TrainRequest, state: bytes | memoryview, data: bytes, digest: str, write: Write) -> tuple[str, str]:
    """Paths of the state (empty if there is none) and of the update, whose hash is ``digest``."""
    paths = []
    try:
        for kind, content, hashed in (("state", state, hashlib.sha256(state).hexdigest()), ("update", data, digest)):
            name = f"{request.job.run}.{request.job.assignment}.{hashed[:16]}.{kind}"
            paths.append(Path(request.output_folder) / name)
            if content:
                write(paths[-1], content)
    except StorageError:
        for path in paths:
            remove(path)
        raise
    return (str(paths[0]) if state else ""), str(paths[1])
