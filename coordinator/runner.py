"""The files of one run, and the work on them: checking updates, making models, evaluating."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation import decode_update, make_model
from coordinator.methods import create_method
from edge_runtime.bundle import Bundle
from edge_runtime.compression.frame import frame_limit
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from coordinator.aggregation import Made
    from coordinator.events import Aggregate, RunRow
    from coordinator.plan import Plan
    from coordinator.run_state import RunState
    from coordinator.store import Store
    from edge_runtime.messages import BlobRef, Evaluation


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
        self._update_limit = frame_limit(dict.fromkeys(self._method.channels, self._layout))
        self.sent_blobs: dict[str, BlobRef] = {run.bundle.sha256: run.bundle}

    def sends(self, blob: BlobRef) -> None:
        """A device was told of this blob and may ask for it."""
        self.sent_blobs[blob.sha256] = blob

    def unfit(self, blob: BlobRef) -> str:
        """Why an offered update is not even received; empty if it is."""
        if blob.size_bytes > self._update_limit:
            return f"update of {blob.size_bytes} bytes refused: for this model {self._update_limit} is the most"
        return ""

    def damage(self, blob: BlobRef) -> str:
        """Why a received update cannot be used (undecodable, wrong size, NaN); empty if it can."""
        try:
            decode_update(self._blobs.path(blob.sha256), self._method, self._layout)
        except (CodecError, OSError) as error:
            if not self._store.is_named(blob.sha256):  # what was offered may be no update, but a model or bundle
                self._blobs.delete(blob.sha256)
            return str(error)
        return ""

    def aggregate(self, effect: Aggregate) -> Made:
        """Makes the next model; see :func:`coordinator.aggregation.make_model`."""
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
        """Deletes the bytes of counted updates and of models that no open assignment can name any more."""
        if self._plan.retain_updates == "all":
            return
        self._store.drop_update_blobs(state.run.run, state.run.round)
        oldest = state.oldest_version
        for row in self._store.rounds(state.run.run, first=max(0, oldest - 3)):  # a crash may have skipped one call
            if row.version >= oldest or row.model.sha256 == state.run.model.sha256:
                continue
            # Equal runs make equal models: another one may still be where this one was.
            if not self._store.is_named(row.model.sha256, besides=state.run.run):
                self._blobs.delete(row.model.sha256)
            self.sent_blobs.pop(row.model.sha256, None)

    def clean_up(self, state: RunState) -> None:
        """The run has ended: deletes the bytes of all its updates, unless they are to be kept."""
        if self._plan.retain_updates != "all":
            self._store.drop_update_blobs(state.run.run, state.run.round + 1)
