"""Makes the next model from stored updates: one by one, in update id order, into float64 sums.

Memory is constant in the number of updates, and the same updates give the same bits whatever order they arrived in.
The model and the server method's state travel between rounds as blobs: a frame with the channel ``model`` and a
safetensors file.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Protocol

import numpy as np

from coordinator.errors import ModelError
from coordinator.methods import create_method
from edge_runtime.compression import registry as codecs
from edge_runtime.errors import CodecError
from edge_runtime.messages import BlobRef

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy.typing as npt

    from coordinator.events import Aggregate, RoundRow, RunRow, UpdateRow
    from coordinator.methods.base import ServerMethod, State, Vector
    from coordinator.plan import Plan
    from edge_runtime.compression.base import Layout
    from edge_runtime.store.blobs import StoredBlob

MODEL_CHANNEL = "model"


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


class Made:
    """The blobs of a new model version; ``down`` is None where devices download ``model`` itself."""

    __slots__ = ("down", "method_state", "model")

    def __init__(self, model: BlobRef, down: BlobRef | None, method_state: BlobRef | None) -> None:
        self.model = model
        self.down = down
        self.method_state = method_state


def aggregate(
    base: Vector,
    updates: Iterable[tuple[UpdateRow, bytes | Path]],
    method: ServerMethod,
    layout: Layout,
    state: State | None = None,
) -> tuple[Vector, State]:
    """The next model, float32 ``[layout.size]``, and the method's next state.

    Args:
        base: the current model, float32 ``[layout.size]``.
        updates: rows with their weights and the encoded update (bytes or a file), in update id order.
        method: combines them.
        layout: of the model; every channel has it.
        state: the method's state; None: as it is before round 0.

    Raises:
        CodecError: an update cannot be decoded.
        ModelError: no updates, out of order, or a model that is not finite comes out.
    """
    totals = {channel: np.zeros(layout.size, np.float64) for channel in method.channels}
    state = method.init(layout.size) if state is None else state
    weights: list[float] = []
    last = None
    for row, payload in updates:
        if row.weight is None or not row.weight > 0 or (last is not None and row.update <= last):
            raise ModelError(f"update {row.update} has no weight or is out of order; updates go in update id order")
        last = row.update
        weights.append(row.weight)
        try:
            method.aggregate(totals, decode_update(payload, method, layout), row.weight)
        except (CodecError, OSError) as error:
            raise CodecError(f"update {row.update}: {error}") from error
    if not weights:
        raise ModelError("there is no update to aggregate")
    new, state = method.apply(base, totals, sum(weights), state)
    if "delta" in totals:
        _average_buffers(new, base, totals["delta"] * (1.0 / sum(weights)), layout)
    if not np.isfinite(new).all():
        raise ModelError("the aggregated model holds NaN or infinite values; lower the learning rates")
    return new, state


def _average_buffers(new: Vector, base: Vector, mean_delta: npt.NDArray[np.float64], layout: Layout) -> None:
    """Running statistics become the devices' mean whatever the method does: momentum makes variances negative."""
    if layout.buffers:
        into, start, deltas = layout.split(new), layout.split(base), layout.split(mean_delta)
        for name in layout.buffers:
            into[name][...] = start[name] + deltas[name]


def decode_update(payload: bytes | Path, method: ServerMethod, layout: Layout) -> dict[str, Vector]:
    """The vectors of an encoded update, finite float32 ``[layout.size]`` by channel.

    Raises:
        CodecError: it cannot be decoded, or is not what the method wants.
    """
    data = payload if isinstance(payload, bytes) else _mapped(payload)
    return codecs.decode(data, dict.fromkeys(method.channels, layout))


def make_initial(blobs: Blobs, plan: Plan, initial: Vector, layout: Layout) -> Made:
    """Stores version 0 and the server method's first state."""
    return _store(blobs, plan, layout, initial, create_method(plan).init(layout.size))


def make_model(blobs: Blobs, plan: Plan, effect: Aggregate, layout: Layout, *, updates: Blobs | None = None) -> Made:
    """Carries out an Aggregate effect: reads model, state and updates, stores the new model and state.

    ``updates`` is where the updates lie, where that is not ``blobs``.

    Raises:
        CodecError: a blob cannot be decoded.
        ModelError: a blob is missing, or no usable model comes out.
        StorageError: the disk is full.
    """
    method = create_method(plan)
    new, state = aggregate(
        read_model(blobs, effect.base, layout),
        ((row, _find(updates or blobs, row.blob, f"update {row.update}")) for row in effect.updates),
        method,
        layout,
        _read_state(blobs, effect.method_state),
    )
    return _store(blobs, plan, layout, new, state)


def read_model(blobs: Blobs, model: BlobRef, layout: Layout) -> Vector:
    """A stored model version, float32 ``[layout.size]``, read-only.

    Raises:
        ModelError: it is not in the store.
        CodecError: it cannot be decoded.
    """
    return codecs.decode(_mapped(_find(blobs, model, "model")), {MODEL_CHANNEL: layout})[MODEL_CHANNEL]


def recompute(
    blobs: Blobs,
    plan: Plan,
    run: RunRow,
    rounds: Iterable[tuple[RoundRow, list[UpdateRow]]],
    layout: Layout,
    *,
    updates: Blobs | None = None,
) -> Iterable[tuple[RoundRow, str]]:
    """Builds every model version again from version 0 and the retained updates.

    Args:
        blobs: where models and updates lie.
        plan: of the run; ``retain_updates`` must have been "all".
        run: its row.
        rounds: closed rounds in order, each with its counted updates in update id order.
        layout: of the model.
        updates: where the updates lie, where that is not ``blobs``.

    Yields:
        Each round with the SHA-256 of the model blob that came out; it must equal ``round.model.sha256``.

    Raises:
        ModelError: an update is not retained.
        CodecError: a blob cannot be decoded.
    """
    method = create_method(plan)
    vector = read_model(blobs, run.initial_model, layout)
    state = _read_state(blobs, run.initial_method_state)
    for row, counted in rounds:
        pairs = ((update, _find(updates or blobs, update.blob, f"update {update.update}")) for update in counted)
        vector, state = aggregate(vector, pairs, method, layout, state)
        yield row, _sha256(encode_model(vector, layout))


def encode_model(vector: Vector, layout: Layout) -> bytes:
    """The blob of a model version: an uncompressed frame, so that its hash stands for the exact values."""
    return codecs.encode("raw", {MODEL_CHANNEL: vector}, {MODEL_CHANNEL: layout})[0]


def _store(blobs: Blobs, plan: Plan, layout: Layout, vector: Vector, state: State) -> Made:
    model = _put(blobs, encode_model(vector, layout))
    channels = create_method(plan).down(vector, state)
    down = None
    if plan.downlink_codec != "raw" or list(channels) != [MODEL_CHANNEL] or channels[MODEL_CHANNEL] is not vector:
        down = _put(blobs, codecs.encode(plan.downlink_codec, channels, dict.fromkeys(channels, layout))[0])
    kept = None
    if state:
        from safetensors.numpy import save

        kept = _put(blobs, save(state))
    return Made(model, down, kept)


def _read_state(blobs: Blobs, state: BlobRef | None) -> State:
    if state is None:
        return {}
    from safetensors.numpy import load

    return load(_find(blobs, state, "state of the server method").read_bytes())


def _put(blobs: Blobs, data: bytes) -> BlobRef:
    stored = blobs.put(data)
    return BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes)


def _find(blobs: Blobs, blob: BlobRef, what: str) -> Path:
    if not blobs.has(blob.sha256):
        raise ModelError(f"{what} (blob {blob.sha256[:12]}) is not in the store; was it deleted, or never retained?")
    return blobs.path(blob.sha256)


def _mapped(path: Path) -> memoryview:
    """The file's bytes without reading them at once: pages come as they are summed and may go again."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _sha256(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()
