"""Models and states in the store: written durably, read without taking all of a file at once."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Protocol

from coordinator.aggregation import create_method
from coordinator.errors import ModelError
from coordinator.plan import is_lossless
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, decode, decode_model
from edge_runtime.messages import BlobRef

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.aggregation.base import State, Vector
    from coordinator.plan import Plan
    from edge_runtime.compression import Layout
    from edge_runtime.store.blobs import StoredBlob


class Blobs(Protocol):
    """What is needed of a :class:`~edge_runtime.store.blobs.BlobStore`."""

    def path(self, sha: str) -> Path:
        """Where a blob lies."""
        ...

    def has(self, sha: str) -> bool:
        """Whether it is there."""
        ...

    def put(self, data: bytes | memoryview) -> StoredBlob:
        """Stores bytes durably."""
        ...


def read_model(blobs: Blobs, model: BlobRef, layout: Layout) -> Vector:
    """A stored model version, float32 ``[layout.size]``, read-only.

    Raises:
        ModelError: it is not in the store.
        CodecError: it cannot be decoded.
    """
    return decode_model(mapped(find(blobs, model, "model")), layout)


def read_shared(blobs: Blobs, blob: BlobRef, version: int, layout: Layout) -> SharedModel:
    """The shared model of a lossy downlink; ``blob`` is its snapshot, or the initial model where ``version`` is 0.

    Raises:
        ModelError: it is not in the store.
        CodecError: it cannot be decoded.
    """
    if version == 0:
        return SharedModel.start(read_model(blobs, blob, layout), layout)
    return SharedModel.decode(mapped(find(blobs, blob, "shared model")), layout)


def read_held(blobs: Blobs, plan: Plan, blob: BlobRef, version: int, layout: Layout) -> Vector:
    """The model as devices hold it, float32 ``[layout.size]``, that ``blob`` brings them to.

    Raises:
        ModelError: it is not in the store.
        CodecError: it cannot be decoded.
    """
    channels, path = create_method(plan).down_channels, find(blobs, blob, "model as devices hold it")
    return held_vector(path, version, layout, channels, lossless=is_lossless(plan.downlink.codec))


def held_vector(path: Path, version: int, layout: Layout, channels: tuple[str, ...], *, lossless: bool) -> Vector:
    """The same of a file. It holds ``channels``, or the model alone, or a snapshot of a lossy downlink.

    Raises:
        CodecError: it cannot be decoded.
    """
    data = mapped(path)
    if not lossless:
        if version == 0:
            return SharedModel.start(decode_model(data, layout), layout).vector
        return SharedModel.decode(data, layout).vector
    if len(channels) > 1:
        return decode(data, dict.fromkeys(channels, layout))[MODEL_CHANNEL].vector()
    return decode_model(data, layout)


def store_state(blobs: Blobs, state: State) -> BlobRef | None:
    """Stores the state of a server method and its optimiser; None if there is none."""
    if not state:
        return None
    from safetensors.numpy import save

    return put(blobs, save(state))


def read_state(blobs: Blobs, state: BlobRef | None) -> State:
    """The inverse of :func:`store_state`.

    Raises:
        ModelError: it is not in the store.
    """
    if state is None:
        return {}
    from safetensors.numpy import load

    return load(find(blobs, state, "state of the server method").read_bytes())


def put(blobs: Blobs, data: bytes) -> BlobRef:
    """Stores bytes durably and gives their reference."""
    stored = blobs.put(data)
    return BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes)


def find(blobs: Blobs, blob: BlobRef, what: str) -> Path:
    """Where a blob lies.

    Raises:
        ModelError: it is not in the store; the message says ``what`` it is.
    """
    if not blobs.has(blob.sha256):
        raise ModelError(f"{what} (blob {blob.sha256[:12]}) is not in the store; was it deleted, or never retained?")
    return blobs.path(blob.sha256)


def mapped(path: Path) -> memoryview:
    """The file's bytes without reading them at once: pages come as they are summed and may go again."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
