"""Server method and optimiser at work: a round's updates become the next model and the next state."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from coordinator.aggregation import create_method, create_optimizer
from coordinator.aggregation.decoding import Decoder, Source, channels_of
from coordinator.aggregation.gathering import StoredContribution, StoredRound
from coordinator.errors import ModelError
from coordinator.plan import is_lossless
from edge_runtime.errors import ConfigError
from edge_runtime.methods.registry import method_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from coordinator.aggregation.base import ServerMethod, ServerOptimizer, State, Sums, Vector
    from coordinator.aggregation.gathering import BlobTable
    from coordinator.events import UpdateRow
    from coordinator.executors.base import Executor
    from coordinator.plan import Plan
    from edge_runtime.compression import Layout
    from edge_runtime.messages import Role

_METHOD, _OPTIMIZER = "method.", "optimizer."  # before the names of their arrays in the stored state


def check_method(plan: Plan, method: ServerMethod) -> None:
    """Whether a plan's server method can do its work with the plan's client method, downlink and rounds.

    Raises:
        ConfigError: it cannot; the message says what to change.
        TrainingError: there is no such client method.
    """
    where, sent = f"plan {plan.name!r}: server_method {plan.server_method!r}", method.down_channels
    if len(sent) > 1 and not is_lossless(plan.downlink.codec):
        raise ConfigError(
            f"{where} sends {', '.join(sent)}; only a lossless downlink carries more than the model, set "
            f'codec = "zstd" in [downlink]'
        )
    client = method_class(plan.method)
    if set(client.down_channels) != set(sent):
        raise ConfigError(
            f"{where} sends {', '.join(sent)}, method {plan.method!r} takes {', '.join(client.down_channels)}; choose "
            "two that belong together"
        )
    for role, channels in method.roles.items():
        if set(client.roles.get(role, ())) != set(channels):
            raise ConfigError(f"{where} has the role {role!r}, which method {plan.method!r} does not know")
    if method.least > plan.participation.target:
        raise ConfigError(
            f"{where} needs at least {method.least} updates a round to stand what its options say, "
            f"participation.target is {plan.participation.target}; raise it, or expect fewer liars"
        )


class Server:
    """Server method and optimiser of a plan at work on one model.

    Raises:
        PluginError: the plan names one that is not there, or options that it does not take.
    """

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.method: ServerMethod = create_method(plan)
        self.optimizer: ServerOptimizer = create_optimizer(plan)

    def init(self) -> State:
        """The state of both before round 0."""
        return _joined(self.method.init(self.layout.size), self.optimizer.init(self.layout.size))

    def down(self, model: Vector, state: State) -> dict[str, Vector]:
        """What devices receive, by channel."""
        return self.method.down(model, _part(state, _METHOD))

    def gather(
        self,
        updates: Iterable[tuple[UpdateRow, bytes | Path]],
        base: Vector,
        *,
        version: int,
        roles: Mapping[str, Role] | None = None,
        held: Callable[[int], Vector] | None = None,
        members: int = 0,
        table: BlobTable | None = None,
        executor: Executor | None = None,
    ) -> StoredRound:
        """The round that these updates make.

        Args:
            updates: rows with their weights and the encoded update (bytes or a file), in update id order.
            base: the current model, float32 ``[layout.size]``.
            version: of it.
            roles: by assignment, those that are no trainers.
            held: gives the model of a version as devices hold it, for codecs that predict from it.
            members: devices that have a row in the table or may get one.
            table: of methods that have one.
            executor: decodes and sums; None: this process.

        Raises:
            ModelError: no updates, out of order, or one without a weight.
            CodecError: a role that the method does not know.
        """
        roles = roles or {}
        known: dict[Role, tuple[str, ...]] = {}
        for role in ("trainer", *dict.fromkeys(roles.values())):
            known[role] = channels_of(self.method, role)
        decoder, contributions = Decoder(self.layout, known, held), []
        for row, payload in updates:
            role, meta = roles.get(row.update.assignment, "trainer"), row.meta
            source = Source(row.update, meta.model_version, role, payload)
            staleness = max(0, version - meta.model_version)
            contributions.append(StoredContribution(source, meta, row.weight or 0.0, staleness))
        seed = int.from_bytes(sha256(f"{self.plan.seed}/{version}".encode()).digest()[:8], "little")
        return StoredRound(contributions, decoder, base, members=members, table=table, seed=seed, executor=executor)

    def next(self, round_: StoredRound, state: State) -> tuple[Vector, State, dict[str, float]]:
        """The next model, float32 ``[layout.size]``, the next state, and hyper-parameters for the next jobs.

        Raises:
            CodecError: an update cannot be decoded.
            ModelError: a model that is not finite comes out.
        """
        layout = self.layout
        change, own = self.method.combine(round_, _part(state, _METHOD))
        # Running statistics become what the devices saw, whatever the optimiser: momentum makes variances negative.
        observed = _take_buffers(change, layout)
        new, other, hyper = self.optimizer.apply(round_.base, change, _part(state, _OPTIMIZER))
        into, start = layout.split(new), layout.split(round_.base)
        for name, seen in observed.items():
            into[name][...] = start[name] + seen
        if not np.isfinite(new).all():
            raise ModelError("the aggregated model holds NaN or infinite values; lower the learning rates")
        return new, _joined(own, other), hyper


def _take_buffers(change: Sums, layout: Layout) -> dict[str, Sums]:
    """The change of the buffers by name; it is 0 in ``change`` afterwards, so that no optimiser sees it."""
    taken: dict[str, Sums] = {}
    if layout.buffers:
        for name, part in layout.split(change).items():
            if name in layout.buffers:
                taken[name] = part.copy()
                part[...] = 0
    return taken


def _joined(method: State, optimizer: State) -> State:
    return {_METHOD + name: array for name, array in method.items()} | {
        _OPTIMIZER + name: array for name, array in optimizer.items()
    }


def _part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
