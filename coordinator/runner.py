"""The files of one run, and the work on them: checking updates, making models, evaluating."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from coordinator.aggregation import create_method
from coordinator.aggregation.decoding import HELD_IN_MEMORY, Decoder, Models, Source, channels_of
from coordinator.aggregation.making import make_model
from coordinator.checking import Check
from coordinator.plan import is_lossless
from edge_runtime.bundle import Bundle
from edge_runtime.compression.container import size_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.aggregation.making import Made
    from coordinator.events import Aggregate, AssignmentRow, RoundRow, RunRow
    from coordinator.executors.base import Executor
    from coordinator.plan import Plan
    from coordinator.run_state import RunState
    from coordinator.store import Store
    from edge_runtime.messages import BlobRef, Evaluation, Role, UpdateId


class RunFiles:
    """What the server needs of one run beside its state.

    Raises:
        BundleError: the run's bundle is missing or damaged.
    """

    def __init__(self, store: Store, plan: Plan, run: RunRow, executor: Executor | None = None) -> None:
        self._store, self._plan, self._run, self._executor = store, plan, run, executor
        self._blobs = store.blobs
        self.bundle = Bundle.open(self._blobs.path(run.bundle.sha256))
        self._layout = self.bundle.layout()
        self._method = create_method(plan)
        self._decoder = lru_cache(HELD_IN_MEMORY)(self._make_decoder)
        most = max((self._method.channels, *self._method.roles.values()), key=len)
        self._update_limit = size_limit(dict.fromkeys(most, self._layout))
        self.sent_blobs: dict[str, BlobRef] = {run.bundle.sha256: run.bundle}

    def sends(self, *blobs: BlobRef) -> None:
        """A device was told of these blobs and may ask for them."""
        self.sent_blobs.update({blob.sha256: blob for blob in blobs})

    def unfit(self, blob: BlobRef) -> str:
        """Why an offered update is not even received; empty if it is."""
        if blob.size_bytes > self._update_limit:
            return f"update of {blob.size_bytes} bytes refused: for this model {self._update_limit} is the most"
        return ""

    def check(self, update: UpdateId, blob: BlobRef, assignment: AssignmentRow) -> Check:
        """What is to be checked of a received update before it may count; ``blob`` is in the store."""
        decoder = self._decoder(assignment.model, assignment.version, assignment.role)
        source = Source(update, assignment.version, assignment.role, self._blobs.path(blob.sha256))
        return Check(source, decoder, self._plan.uplink.max_norm)

    def drop_damaged(self, blob: BlobRef) -> None:
        """Deletes what was offered as an update and is none; unless it is something else, as a model or bundle."""
        if not self._store.is_named(blob.sha256):
            self._blobs.delete(blob.sha256)

    def _make_decoder(self, model: BlobRef, version: int, role: Role) -> Decoder:
        lossless = is_lossless(self._plan.downlink.codec)
        paths = {version: self._blobs.path(model.sha256)}
        models = Models(paths, self._layout, self._method.down_channels, lossless=lossless)
        return Decoder(self._layout, {role: channels_of(self._method, role)}, models)

    def aggregate(self, effect: Aggregate) -> Made:
        """Makes the next model; see :func:`coordinator.aggregation.making.make_model`."""
        return make_model(self._blobs, self._plan, effect, self._layout, executor=self._executor)

    def evaluate(self, model: BlobRef) -> Evaluation:
        """Sums over the run's test set.

        Raises:
            EdgeError: the test set or the model cannot be used.
        """
        from coordinator.evaluation import evaluate_blob

        assert self._run.test_set is not None
        return evaluate_blob(self._blobs, self.bundle, self._run.test_set, model)

    def clean(self, state: RunState) -> None:
        """Deletes the bytes of counted updates, and models and changes that no open assignment can name any more."""
        if self._plan.retain_updates == "all":
            return
        self._store.drop_update_blobs(state.run.run, state.run.round)
        run, rounds = state.run, self._rounds(state)
        recent = [row for row in rounds if row.version >= state.oldest_version]
        needed = {blob for row in recent for blob in (row.model, row.down, row.method_state)}
        needed |= {run.initial_model, run.initial_method_state}  # versions may be equal
        for row in rounds:
            old = [row.model, row.down, row.method_state] if row.version < state.oldest_version else []
            if not state.needs_change(row.version):
                old.append(row.change)
            self._delete(state, [blob for blob in old if blob not in needed])

    def drop_replaced(self, state: RunState, before: Iterable[BlobRef]) -> None:
        """Deletes rows of the method's table that new ones have replaced."""
        kept = {row.blob.sha256 for row in state.table.values()}
        self._delete(state, [blob for blob in before if blob.sha256 not in kept])

    def clean_up(self, state: RunState) -> None:
        """The run has ended: deletes its updates and the ways to its models, unless they are to be kept."""
        self._delete(state, [row.blob for row in state.table.values()])
        if self._plan.retain_updates == "all":
            return
        self._store.drop_update_blobs(state.run.run, state.run.round + 1)
        for row in self._rounds(state):
            self._delete(state, [row.down, row.change])
        run = state.run  # the initial model as it was sent stands in no round
        sent = {run.down.sha256: run.down} if run.down is not None else {}
        sent |= {row.model.sha256: row.model for row in self._store.assignments(run.run, 0) if row.version == 0}
        kept = {run.initial_model.sha256, run.model.sha256}
        self._delete(state, [blob for sha256, blob in sent.items() if sha256 not in kept])

    def _rounds(self, state: RunState) -> list[RoundRow]:
        """The rounds whose blobs may still be here; some more, since a crash may have skipped a call."""
        return self._store.rounds(state.run.run, first=max(0, state.oldest_change - 4))

    def _delete(self, state: RunState, blobs: Iterable[BlobRef | None]) -> None:
        for blob in blobs:
            if blob is None:
                continue
            self.sent_blobs.pop(blob.sha256, None)
            # Equal runs make equal models: another one may still be where this one was.
            if self._blobs.has(blob.sha256) and not self._store.is_named(blob.sha256, besides=state.run.run):
                self._blobs.delete(blob.sha256)
