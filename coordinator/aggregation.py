"""Makes the next model from stored updates: one by one, in update id order, into float64 sums.

Memory is constant in the number of updates, and the same updates give the same bits whatever order they arrived in.
The model and the server method's state travel between rounds as blobs: a container with the channel ``model`` and a
safetensors file.

With a lossy downlink there are two models: the server's own, exact one, and the shared one that devices hold. Each
round sends what encoding left of their difference, so what was not sent stays there for the next (error feedback).
"""

from __future__ import annotations

import math
import mmap
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from coordinator.budget import change_budget
from coordinator.errors import ModelError
from coordinator.methods import create_method
from coordinator.plan import is_lossless
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, decode, decode_model, encode, encode_model
from edge_runtime.errors import CodecError, ConfigError
from edge_runtime.messages import BlobRef

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy.typing as npt

    from coordinator.events import Aggregate, RoundRow, RunRow, UpdateRow
    from coordinator.methods.base import ServerMethod, State, Vector
    from coordinator.plan import Plan
    from edge_runtime.compression import Layout, Update
    from edge_runtime.messages import UpdateId
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


class Made(NamedTuple):
    """The blobs of a new model version; see :class:`coordinator.events.RoundRow` for what they are."""

    model: BlobRef
    down: BlobRef | None = None
    change: BlobRef | None = None
    vector_sha256: str | None = None
    method_state: BlobRef | None = None


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
            decoded = decode_update(payload, method, layout, update=row.update, version=row.meta.model_version)
            method.aggregate(totals, decoded, row.weight)
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


def decode_update(
    payload: bytes | Path,
    method: ServerMethod,
    layout: Layout,
    *,
    update: UpdateId,
    version: int,
    max_norm: float | None = None,
) -> dict[str, Update]:
    """The decoded update, finite, of ``[layout.size]`` by channel.

    Args:
        payload: a container, or the file that holds it.
        method: says which channels there must be.
        layout: of the model.
        update: whose bytes they must be.
        version: of the model that they must be relative to.
        max_norm: the largest L2 norm of a channel; None: any.

    Raises:
        CodecError: it cannot be decoded, or is not what the method wants.
    """
    data = payload if isinstance(payload, bytes) else _mapped(payload)
    layouts = dict.fromkeys(method.channels, layout)
    limit = math.inf if max_norm is None else max_norm
    return decode(data, layouts, base_version=version, tag=update_tag(update), max_norm=limit)


def make_initial(blobs: Blobs, plan: Plan, initial: Vector, layout: Layout) -> Made:
    """Stores version 0 and the server method's first state.

    Raises:
        ConfigError: the server method sends more than the model, and the downlink is lossy.
        StorageError: the disk is full.
    """
    state = create_method(plan).init(layout.size)
    if is_lossless(plan.downlink.codec):
        return _store(blobs, plan, layout, initial, state)
    if _sends_more(plan, initial, state):
        raise ConfigError(
            f"plan {plan.name!r}: server_method {plan.server_method!r} sends more than the model, downlink codec "
            f"{plan.downlink.codec!r} loses some of it; choose a lossless one, as zstd"
        )
    # The shared model of version 0 is no blob: whoever has the initial parameters can make it.
    digest = SharedModel.start(initial, layout).sha256()
    return _store(blobs, plan, layout, initial, state)._replace(vector_sha256=digest)


def make_model(blobs: Blobs, plan: Plan, effect: Aggregate, layout: Layout, *, updates: Blobs | None = None) -> Made:
    """Carries out an Aggregate effect: reads model, state and updates, stores the new model and state.

    With a lossy downlink also the change that leads to the new shared model, and its snapshot. The same effect gives
    the same bytes.

    ``updates`` is where the updates lie, where that is not ``blobs``.

    Raises:
        CodecError: a blob cannot be decoded, or the change cannot be encoded within its budget.
        ModelError: a blob is missing, or no usable model comes out.
        StorageError: the disk is full.
    """
    method = create_method(plan)
    base = read_model(blobs, effect.base, layout)
    new, state = aggregate(
        base,
        ((row, _find(updates or blobs, row.blob, f"update {row.update}")) for row in effect.updates),
        method,
        layout,
        _read_state(blobs, effect.method_state),
    )
    if is_lossless(plan.downlink.codec):
        return _store(blobs, plan, layout, new, state)
    if effect.shared is None:
        before = SharedModel.start(base, layout)
    else:
        before = SharedModel.decode(_mapped(_find(blobs, effect.shared, "shared model")), layout)
    change, after = next_shared(plan, before, new, layout, effect.version)
    return _store(blobs, plan, layout, new, state, shared=after, change=change)


def next_shared(
    plan: Plan, before: SharedModel, new: Vector, layout: Layout, version: int
) -> tuple[bytes, SharedModel]:
    """The encoded change from the shared model of ``version``, and the shared model that it leads to.

    Args:
        plan: of the run.
        before: what devices hold.
        new: the server's next model, float32 ``[layout.size]``.
        layout: of both.
        version: of ``before``.

    Raises:
        CodecError: the change cannot be encoded within its budget, or leaves the range of float32.
    """
    down, layouts = plan.downlink, {MODEL_CHANNEL: layout}
    data = encode(
        CodecSpec(down.codec, {**down.options, "error_feedback": False}),
        {MODEL_CHANNEL: new - before.vector},
        layouts,
        budget_bytes=change_budget(down.target_ratio, down.budget_bytes, layout.size),
        seed=plan.seed + version,
        base_version=version,
    ).data
    return data, before.plus(decode(data, layouts)[MODEL_CHANNEL].vector())  # what devices will decode, and no other


def read_model(blobs: Blobs, model: BlobRef, layout: Layout) -> Vector:
    """A stored model version, float32 ``[layout.size]``, read-only.

    Raises:
        ModelError: it is not in the store.
        CodecError: it cannot be decoded.
    """
    return decode_model(_mapped(_find(blobs, model, "model")), layout)


class Recomputed(NamedTuple):
    """A round, and the hashes that came out of its updates; ``vector_sha256`` is of the shared model, if there is."""

    round: RoundRow
    model_sha256: str
    vector_sha256: str | None

    @property
    def same(self) -> bool:
        """Whether they are those that the round made."""
        return (self.model_sha256, self.vector_sha256) == (self.round.model.sha256, self.round.vector_sha256)


def recompute(
    blobs: Blobs,
    plan: Plan,
    run: RunRow,
    rounds: Iterable[tuple[RoundRow, list[UpdateRow]]],
    layout: Layout,
    *,
    updates: Blobs | None = None,
) -> Iterable[Recomputed]:
    """Builds every model version again from version 0 and the retained updates.

    Args:
        blobs: where models and updates lie.
        plan: of the run; ``retain_updates`` must have been "all".
        run: its row.
        rounds: closed rounds in order, each with its counted updates in update id order.
        layout: of the model.
        updates: where the updates lie, where that is not ``blobs``.

    Yields:
        Each round with the SHA-256 of the model blob that came out, and of the shared model's numbers.

    Raises:
        ModelError: an update is not retained.
        CodecError: a blob cannot be decoded.
    """
    method = create_method(plan)
    vector = read_model(blobs, run.initial_model, layout)
    state = _read_state(blobs, run.initial_method_state)
    shared = None if is_lossless(plan.downlink.codec) else SharedModel.start(vector, layout)
    for row, counted in rounds:
        pairs = ((update, _find(updates or blobs, update.blob, f"update {update.update}")) for update in counted)
        vector, state = aggregate(vector, pairs, method, layout, state)
        if shared is not None:
            _, shared = next_shared(plan, shared, vector, layout, row.version - 1)
        digest = sha256(encode_model(vector, layout)).hexdigest()
        yield Recomputed(row, digest, None if shared is None else shared.sha256())


def _sends_more(plan: Plan, vector: Vector, state: State) -> bool:
    channels = create_method(plan).down(vector, state)
    return list(channels) != [MODEL_CHANNEL] or channels[MODEL_CHANNEL] is not vector


def _store(
    blobs: Blobs,
    plan: Plan,
    layout: Layout,
    vector: Vector,
    state: State,
    *,
    shared: SharedModel | None = None,
    change: bytes | None = None,
) -> Made:
    model = _put(blobs, encode_model(vector, layout))
    down = None
    if shared is not None:
        down = _put(blobs, shared.encode())
    elif is_lossless(plan.downlink.codec) and (plan.downlink.codec != "raw" or _sends_more(plan, vector, state)):
        channels = create_method(plan).down(vector, state)
        spec = CodecSpec(plan.downlink.codec, plan.downlink.options)
        down = _put(blobs, encode(spec, channels, dict.fromkeys(channels, layout)).data)
    kept = None
    if state:
        from safetensors.numpy import save

        kept = _put(blobs, save(state))
    return Made(
        model,
        down,
        None if change is None else _put(blobs, change),
        None if shared is None else shared.sha256(),
        kept,
    )


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
