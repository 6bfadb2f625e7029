"""The pipe between the agent's daemon and its worker: a length, then one typed message.

Every frame is a little-endian u32 length and that many bytes of MessagePack. Both ends read with
:class:`FrameReader`, which takes bytes in any pieces, so a reader never blocks in the middle of a frame.
"""

from __future__ import annotations

import struct
from typing import Literal, TypeAlias

import msgspec

from edge_runtime.data.config import DatasetConfig
from edge_runtime.errors import MessageError
from edge_runtime.messages import Job, UpdateId, UpdateMeta

FRAME_LIMIT_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")

FailureKind: TypeAlias = Literal["data", "bundle", "training", "codec", "storage", "internal"]
Phase: TypeAlias = Literal["train", "compress"]


class RefusedUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """An update of this run that was refused. ``key`` is what :class:`Trained` said of it."""

    update: UpdateId
    path: str
    key: str


class TrainRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="train"):
    """Do this job. All paths are local; the daemon has verified the hashes of the bundle and of the model's blobs.

    The update is written into ``output_folder``, and beside it the state that the run has then (personal tensors, what
    the codec did not send). ``state_path`` is the run's state now, empty if it has none, and ``refused`` is to be sent
    again. ``model_paths`` follow ``job.model.blobs``; ``models_folder`` holds models of earlier jobs and takes this
    one; empty: none. The versions ``pinned`` stay in it: updates that may still be refused are relative to them.
    ``code_dir`` is where the module of a dataset factory is looked for first.
    """

    job: Job
    device: str
    bundle_path: str
    model_paths: list[str]
    output_folder: str
    dataset: DatasetConfig
    models_folder: str = ""
    state_path: str = ""
    refused: list[RefusedUpdate] = []
    pinned: list[int] = []
    threads: int = 1
    code_dir: str = ""


class StopEarly(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="stop"):
    """End the training of this job after the step that runs, and send what it reached. Meant for no later job."""

    run: str
    assignment: str
    sequence: int
    reason: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="ready"):
    """The worker listens."""

    backends: list[str]


class PhaseBegun(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="phase"):
    """The worker begins to train, or to encode and write what it trained; before that it loads and evaluates."""

    phase: Phase


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="progress"):
    """Training goes on; sent about once a second. ``loss`` is of the last step."""

    step: int
    steps_total: int
    loss: float


class Trained(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="trained"):
    """The job is done and its update durable at ``path``. A job that only evaluates has no update: ``path`` is empty.

    ``state_path`` is the run's state after this update, durable too; empty: nothing is to be kept. The updates in
    ``returned`` are part of it, or dropped. ``key`` names bundle, codec and (of one that was predicted) model with
    which this update can be taken back if it is refused; empty: it cannot. ``dataset_samples`` is what the dataset
    holds now, before windows and hold-out. ``train_s`` and ``compress_s`` are wall times of the two phases,
    ``train_cpu_s`` and ``compress_cpu_s`` the CPU times of this process in them.
    """

    path: str
    sha256: str
    size_bytes: int
    meta: UpdateMeta
    dataset_samples: int
    state_path: str = ""
    key: str = ""
    returned: list[UpdateId] = []
    train_s: float = 0.0
    compress_s: float = 0.0
    train_cpu_s: float = 0.0
    compress_cpu_s: float = 0.0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="failed"):
    """The job ended without an update; ``reason`` is one line fit for a user."""

    kind: FailureKind
    reason: str


ToWorker: TypeAlias = TrainRequest | StopEarly
FromWorker: TypeAlias = Ready | PhaseBegun | Progress | Trained | Failed

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """All frames that are complete with ``data``, without their lengths.

        Raises:
            MessageError: a length is over the limit; the stream is damaged and cannot be used any more.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > FRAME_LIMIT_BYTES:
                raise MessageError(f"frame of {length} bytes on the worker's pipe refused: {FRAME_LIMIT_BYTES} at most")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return frames


def encode(message: ToWorker | FromWorker) -> bytes:
    """The frame of a message; raises MessageError if it is over the limit."""
    data = _encoder.encode(message)
    if len(data) > FRAME_LIMIT_BYTES:
        raise MessageError(f"{type(message).__name__} of {len(data)} bytes is over the pipe's limit")
    return _LENGTH.pack(len(data)) + data


def decode_to_worker(frame: bytes) -> ToWorker:
    """Message of a frame for the worker; raises MessageError if it is malformed."""
    try:
        return _to_worker.decode(frame)
    except msgspec.MsgspecError as error:
        raise MessageError(f"request to the worker refused: {error}") from error


def decode_from_worker(frame: bytes) -> FromWorker:
    """Message of a frame from the worker; raises MessageError if it is malformed."""
    try:
        return _from_worker.decode(frame)
    except msgspec.MsgspecError as error:
        raise MessageError(f"reply of the worker refused: {error}") from error
