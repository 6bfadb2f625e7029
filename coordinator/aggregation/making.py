"""Makes the next model from stored updates, always in update id order, in float64.

Memory is constant in the number of updates for methods that add them up, and the same updates give the same bits
whatever order they arrived in, and whichever processes decoded and summed them. The model and the states of server
method and optimiser travel between rounds as blobs: a container with the channel ``model`` and a safetensors file.

With a lossy downlink there are two models: the server's own, exact one, and the shared one that devices hold. Each
round sends what encoding left of their difference, so what was not sent stays there for the next (error feedback).
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.aggregation.applying import Server, check_method
from coordinator.aggregation.decoding import Models
from coordinator.aggregation.gathering import BlobTable
from coordinator.budget import change_budget
from coordinator.model_blobs import find, put, read_model, read_shared, read_state, store_state
from coordinator.plan import is_lossless
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, decode, encode, encode_model
from edge_runtime.errors import ConfigError
from edge_runtime.store.blobs import BlobStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.aggregation.base import State, Vector
    from coordinator.events import Aggregate, RoundRow, RunRow, UpdateRow
    from coordinator.executors.base import Executor
    from coordinator.model_blobs import Blobs
    from coordinator.plan import Plan
    from edge_runtime.compression import Layout
    from edge_runtime.messages import BlobRef, Role

_MEMBERS = "round.members"


class Made(NamedTuple):
    """What a new model version consists of; see :class:`coordinator.events.Aggregated` for what the fields are."""

    model: BlobRef
    down: BlobRef | None = None
    change: BlobRef | None = None
    vector_sha256: str | None = None
    method_state: BlobRef | None = None
    hyper: dict[str, float] = {}  # noqa: RUF012 - of a tuple: nobody changes it
    table: dict[str, BlobRef] = {}  # noqa: RUF012


def make_initial(blobs: Blobs, plan: Plan, initial: Vector, layout: Layout) -> Made:
    """Stores version 0 and the first states of server method and optimiser.

    Raises:
        ConfigError: client method, server method and downlink do not fit one another, or rounds are too small.
        StorageError: the disk is full.
    """
    server = Server(plan, layout)
    check_method(plan, server.method)
    state = server.init()
    channels = server.down(initial, state)
    if sorted(channels) != sorted(server.method.down_channels) or channels.get(MODEL_CHANNEL) is not initial:
        raise ConfigError(
            f"plan {plan.name!r}: server_method {plan.server_method!r} sends {', '.join(sorted(channels))}, or changes "
            f"the model itself; it declares {', '.join(server.method.down_channels)}"
        )
    if is_lossless(plan.downlink.codec):
        return _store(blobs, server, initial, state)
    # The shared model of version 0 is no blob: whoever has the initial parameters can make it.
    digest = SharedModel.start(initial, layout).sha256()
    return _store(blobs, server, initial, state)._replace(vector_sha256=digest)


def make_model(
    blobs: Blobs,
    plan: Plan,
    effect: Aggregate,
    layout: Layout,
    *,
    updates: Blobs | None = None,
    executor: Executor | None = None,
) -> Made:
    """Carries out an Aggregate effect: reads model, state and updates, stores the new model, state and table rows.

    With a lossy downlink also the change that leads to the new shared model, and its snapshot. The same effect gives
    the same bytes.

    Args:
        blobs: where everything lies and goes.
        plan: of the run.
        effect: what to do.
        layout: of the model.
        updates: where the updates lie, where that is not ``blobs``.
        executor: decodes and sums updates; None: this process.

    Raises:
        CodecError: a blob cannot be decoded, or the change cannot be encoded within its budget.
        ModelError: a blob is missing, or no usable model comes out.
        StorageError: the disk is full.
    """
    server, lossless = Server(plan, layout), is_lossless(plan.downlink.codec)
    table = BlobTable(blobs, effect.table, layout) if server.method.table else None
    paths = {version: blobs.path(blob.sha256) for version, blob in effect.held.items()}
    round_ = server.gather(
        ((row, find(updates or blobs, row.blob, f"update {row.update}")) for row in effect.updates),
        read_model(blobs, effect.base, layout),
        version=effect.version,
        roles=effect.roles,
        held=Models(paths, layout, server.method.down_channels, lossless=lossless),
        members=effect.members,
        table=table,
        executor=executor,
    )
    new, state, hyper = server.next(round_, read_state(blobs, effect.method_state))
    if table is not None:
        state[_MEMBERS] = np.array([effect.members], np.int64)  # so that the model can be made again
    if lossless:
        made = _store(blobs, server, new, state)
    else:
        before = read_shared(blobs, effect.held[effect.version], effect.version, layout)
        change, after = next_shared(plan, before, new, layout, effect.version)
        made = _store(blobs, server, new, state, shared=after, change=change)
    return made._replace(hyper=hyper, table={} if table is None else table.changed)


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
    roles: Mapping[str, Role] | None = None,
) -> Iterable[Recomputed]:
    """Builds every model version again from version 0 and the retained updates.

    Args:
        blobs: where models and updates lie.
        plan: of the run; ``retain_updates`` must have been "all".
        run: its row.
        rounds: closed rounds in order, each with its counted updates in update id order.
        layout: of the model.
        updates: where the updates lie, where that is not ``blobs``.
        roles: by assignment, those that were no trainers.

    Yields:
        Each round with the SHA-256 of the model blob that came out, and of the shared model's numbers.

    Raises:
        ModelError: an update is not retained.
        CodecError: a blob cannot be decoded.
    """
    server = Server(plan, layout)
    vector = read_model(blobs, run.initial_model, layout)
    state = read_state(blobs, run.initial_method_state)
    shared = None if is_lossless(plan.downlink.codec) else SharedModel.start(vector, layout)
    held: dict[int, Vector] = {}
    with TemporaryDirectory(prefix="edge-verify-") as folder:
        own = BlobStore(Path(folder))
        rows: dict[str, BlobRef] = {}
        for row, counted in rounds:
            held[row.version - 1] = vector if shared is None else shared.vector
            held.pop(row.version - 2 - plan.participation.max_staleness, None)
            table = BlobTable(own, rows, layout) if server.method.table else None
            round_ = server.gather(
                ((update, find(updates or blobs, update.blob, f"update {update.update}")) for update in counted),
                vector,
                version=row.version - 1,
                roles=roles,
                held=held.__getitem__,
                members=_members(blobs, row) if table is not None else 0,
                table=table,
            )
            vector, state, _ = server.next(round_, state)
            if table is not None:
                _replace(own, rows, table.changed)
            if shared is not None:
                _, shared = next_shared(plan, shared, vector, layout, row.version - 1)
            digest = sha256(encode_model(vector, layout)).hexdigest()
            yield Recomputed(row, digest, None if shared is None else shared.sha256())


def _members(blobs: Blobs, row: RoundRow) -> int:
    return int(read_state(blobs, row.method_state)[_MEMBERS][0])


def _replace(blobs: BlobStore, rows: dict[str, BlobRef], changed: Mapping[str, BlobRef]) -> None:
    """Takes new rows of a table over, and deletes the old ones."""
    old = {rows[device].sha256 for device in changed if device in rows}
    rows.update(changed)
    for digest in old - {blob.sha256 for blob in rows.values()}:
        blobs.delete(digest)


def _store(
    blobs: Blobs,
    server: Server,
    vector: Vector,
    state: State,
    *,
    shared: SharedModel | None = None,
    change: bytes | None = None,
) -> Made:
    downlink = server.plan.downlink
    channels = server.down(vector, state)
    model = put(blobs, encode_model(vector, server.layout))
    down = None
    if shared is not None:
        down = put(blobs, shared.encode())
    elif is_lossless(downlink.codec) and (downlink.codec != "raw" or len(channels) > 1):
        spec = CodecSpec(downlink.codec, downlink.options)
        down = put(blobs, encode(spec, channels, dict.fromkeys(channels, server.layout)).data)
    return Made(
        model,
        down,
        None if change is None else put(blobs, change),
        None if shared is None else shared.sha256(),
        store_state(blobs, state),
    )
