"""Makes the next model from stored updates: one by one, in update id order, into float64 sums.

Memory is constant in the number of updates, and the same updates give the same bits whatever order they arrived in.
The model and the server method's state travel between rounds as blobs: a container with the channel ``model`` and a
safetensors file.

With a lossy downlink there are two models: the server's own, exact one, and the shared one that devices hold. Each
round sends what encoding left of their difference, so what was not sent stays there for the next (error feedback).
"""

from __future__ import annotations

import math
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.aggregation import create_method
from coordinator.budget import change_budget
from coordinator.errors import ModelError
from coordinator.model_blobs import find, mapped, put, read_held, read_model, read_shared, read_state, store_state
from coordinator.plan import is_lossless
from edge_runtime.compression.base import Codec
from edge_runtime.compression.container import unpack, update_tag
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, decode, encode, encode_model
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import CodecError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from coordinator.aggregation.base import ServerMethod, State, Vector
    from coordinator.events import Aggregate, RoundRow, RunRow, UpdateRow
    from coordinator.model_blobs import Blobs
    from coordinator.plan import Plan
    from edge_runtime.compression import Layout, Update
    from edge_runtime.messages import BlobRef, UpdateId

HELD_IN_MEMORY = 2  # models that updates of a predicting codec are relative to; most are of one version


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
    *,
    held: Callable[[int], Vector] | None = None,
) -> tuple[Vector, State]:
    """The next model, float32 ``[layout.size]``, and the method's next state.

    Args:
        base: the current model, float32 ``[layout.size]``.
        updates: rows with their weights and the encoded update (bytes or a file), in update id order.
        method: combines them.
        layout: of the model; every channel has it.
        state: the method's state; None: as it is before round 0.
        held: gives the model of a version as devices hold it, for codecs that predict from it.

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
            version = row.meta.model_version
            decoded = decode_update(payload, method, layout, update=row.update, version=version, held=held)
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
    held: Callable[[int], Vector] | None = None,
) -> dict[str, Update]:
    """The decoded update, finite, of ``[layout.size]`` by channel.

    Args:
        payload: a container, or the file that holds it.
        method: says which channels there must be.
        layout: of the model.
        update: whose bytes they must be.
        version: of the model that they must be relative to.
        max_norm: the largest L2 norm of a channel's buffers, and of all else in it; None: any.
        held: gives the model of a version as devices hold it; asked only where the codec predicts from it.

    Raises:
        CodecError: it cannot be decoded, or is not what the method wants.
        ModelError: the model that it is relative to is not in the store.
    """
    data = mapped(payload) if isinstance(payload, Path) else payload
    layouts = dict.fromkeys(method.channels, layout)
    limit = math.inf if max_norm is None else max_norm
    reference = None
    if held is not None:
        codec = codec_class(unpack(data, layouts)[0].codec)
        if codec.decode_against is not Codec.decode_against:
            reference = held(version)
    return decode(data, layouts, base_version=version, tag=update_tag(update), max_norm=limit, reference=reference)


def make_initial(blobs: Blobs, plan: Plan, initial: Vector, layout: Layout) -> Made:
    """Stores version 0 and the server method's first state.

    Raises:
        ConfigError: the server method sends more than the model, or another one.
        StorageError: the disk is full.
    """
    state = create_method(plan).init(layout.size)
    channels = create_method(plan).down(initial, state)
    if list(channels) != [MODEL_CHANNEL] or channels[MODEL_CHANNEL] is not initial:
        raise ConfigError(
            f"plan {plan.name!r}: server_method {plan.server_method!r} sends more than the model "
            f"({', '.join(sorted(channels))}), or another one; devices take the model alone, choose another method"
        )
    if is_lossless(plan.downlink.codec):
        return _store(blobs, plan, layout, initial, state)
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
        ((row, find(updates or blobs, row.blob, f"update {row.update}")) for row in effect.updates),
        method,
        layout,
        read_state(blobs, effect.method_state),
        held=lru_cache(HELD_IN_MEMORY)(lambda version: read_held(blobs, plan, effect.held[version], version, layout)),
    )
    if is_lossless(plan.downlink.codec):
        return _store(blobs, plan, layout, new, state)
    before = read_shared(blobs, effect.held[effect.version], effect.version, layout)
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
        reference=before.vector,
    ).data
    sent = decode(data, layouts, reference=before.vector)[MODEL_CHANNEL]  # what devices will decode, and nothing else
    return data, before.plus(sent.vector())


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
    state = read_state(blobs, run.initial_method_state)
    shared = None if is_lossless(plan.downlink.codec) else SharedModel.start(vector, layout)
    held: dict[int, Vector] = {}
    for row, counted in rounds:
        held[row.version - 1] = vector if shared is None else shared.vector
        held.pop(row.version - 2 - plan.participation.max_staleness, None)
        pairs = ((update, find(updates or blobs, update.blob, f"update {update.update}")) for update in counted)
        vector, state = aggregate(vector, pairs, method, layout, state, held=held.__getitem__)
        if shared is not None:
            _, shared = next_shared(plan, shared, vector, layout, row.version - 1)
        digest = sha256(encode_model(vector, layout)).hexdigest()
        yield Recomputed(row, digest, None if shared is None else shared.sha256())


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
    model = put(blobs, encode_model(vector, layout))
    down = None
    if shared is not None:
        down = put(blobs, shared.encode())
    elif is_lossless(plan.downlink.codec) and plan.downlink.codec != "raw":
        spec = CodecSpec(plan.downlink.codec, plan.downlink.options)
        down = put(blobs, encode(spec, {MODEL_CHANNEL: vector}, {MODEL_CHANNEL: layout}).data)
    return Made(
        model,
        down,
        None if change is None else put(blobs, change),
        None if shared is None else shared.sha256(),
        store_state(blobs, state),
    )
