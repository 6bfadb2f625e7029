"""The files of one run, and the work on them: checking updates, making models, evaluating."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from coordinator.aggregation import create_method
from coordinator.aggregation.making import HELD_IN_MEMORY, decode_update, make_model
from coordinator.errors import ModelError
from coordinator.model_blobs import read_held
from edge_runtime.bundle import Bundle
from edge_runtime.compression.container import size_limit
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.aggregation.making import Made
    from coordinator.events import Aggregate, RoundRow, RunRow
    from coordinator.plan import Plan
    from coordinator.run_state import RunState
    from coordinator.store import Store
    from edge_runtime.messages import BlobRef, Evaluation, UpdateId, UpdateMeta


class RunFiles:
    """What the server needs of one run beside its state.

    Raises:
        BundleError: the run's bundle is missing or damaged.
    """

    def __init__(self, store: Store, plan: Plan, run: RunRow) -> None:
        self._store, self._plan, self._run = store, plan, run
        self._blobs = store.blobs
        self.bundle = Bundle.open(self._blobs.path(run.bundle.sha256))
        self._layout = self.bundle.layout()
        self._method = create_method(plan)
        self._held = lru_cache(HELD_IN_MEMORY)(
            lambda blob, version: read_held(self._blobs, plan, blob, version, self._layout)
        )
        self._update_limit = size_limit(dict.fromkeys(self._method.channels, self._layout))
        self.sent_blobs: dict[str, BlobRef] = {run.bundle.sha256: run.bundle}

    def sends(self, *blobs: BlobRef) -> None:
        """A device was told of these blobs and may ask for them."""
        self.sent_blobs.update({blob.sha256: blob for blob in blobs})

    def unfit(self, blob: BlobRef) -> str:
        """Why an offered update is not even received; empty if it is."""
        if blob.size_bytes > self._update_limit:
            return f"update of {blob.size_bytes} bytes refused: for this model {self._update_limit} is the most"
        return ""

    def damage(self, blob: BlobRef, update: UpdateId, meta: UpdateMeta, model: BlobRef | None) -> str:
        """Why a received update cannot be used (undecodable, wrong size, NaN, too large a norm); empty if it can.

        ``model`` is the whole model of its assignment, None if that is not known.
        """
        path, limit = self._blobs.path(blob.sha256), self._plan.uplink.max_norm
        held = None if model is None else partial(self._held, model)
        version = meta.model_version
        try:
            decode_update(path, self._method, self._layout, update=update, version=version, max_norm=limit, held=held)
        except (CodecError, ModelError, OSError) as error:
            if not self._store.is_named(blob.sha256):  # what was offered may be no update, but a model or bundle
                self._blobs.delete(blob.sha256)
            return str(error)
        return ""

    def aggregate(self, effect: Aggregate) -> Made:
        """Makes the next model; see :func:`coordinator.aggregation.making.make_model`."""
        return make_model(self._blobs, self._plan, effect, self._layout)

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

    def clean_up(self, state: RunState) -> None:
        """The run has ended: deletes its updates and the ways to its models, unless they are to be kept."""
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
