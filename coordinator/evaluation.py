"""Evaluates model versions on the coordinator's test set, with the code that evaluates on devices."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from coordinator.errors import ModelError
from coordinator.model_blobs import read_model
from edge_runtime.bundle import Bundle
from edge_runtime.data.base import open_dataset
from edge_runtime.data.config import DatasetConfig
from edge_runtime.data.view import View, Window
from edge_runtime.training.onnx_trainer import OnnxTrainer

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.aggregation.base import Vector
    from coordinator.model_blobs import Blobs
    from edge_runtime.messages import BlobRef, Evaluation

BATCH_SIZE = 256


class TestSet:
    """An ``.npz`` file with the arrays ``x`` and ``y``, checked against a bundle. Not for several threads at a time.

    Raises:
        DataError: missing, unreadable, or it does not fit the bundle.
        BundleError: the bundle cannot be read.
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    def __init__(self, path: Path, bundle: Bundle, *, x: str = "x", y: str = "y", threads: int = 1) -> None:
        self.path = path
        dataset = open_dataset(DatasetConfig(name="test_set", path=str(path), format="npz", x=x, y=y))
        self._view = View("test_set", dataset.snapshot(), bundle.manifest, Window())
        self._shapes = bundle.manifest.inputs[0], bundle.manifest.target
        self._trainer = OnnxTrainer(threads)
        self._trainer.load(bundle)

    def check(self) -> None:
        """Reads every sample once.

        Raises:
            DataError: a sample is NaN or infinite; the message names the first.
        """
        import numpy as np

        x = np.empty((BATCH_SIZE, *self._shapes[0].shape), self._shapes[0].dtype)
        y = np.empty((BATCH_SIZE, *self._shapes[1].shape), self._shapes[1].dtype)
        rows = self._view.train
        for start in range(0, len(rows), BATCH_SIZE):
            self._view.read(rows[start : start + BATCH_SIZE], x, y)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._view.train)

    def evaluate(self, vector: Vector, batch_size: int = BATCH_SIZE) -> Evaluation:
        """Sums over all samples for the model ``vector``, float32 ``[layout.size]``.

        Raises:
            BundleError: the bundle has no usable ``evaluate`` graph.
            DataError: a sample is NaN or infinite.
            TrainingError: the loss is not finite.
            ModelError: the test set is smaller than the one batch size of the bundle's graph.
        """
        result = self._trainer.evaluate(vector, self._view, self._view.train, batch_size)
        if result is None:
            raise ModelError(f"{self.path}: {len(self)} samples do not fill one batch of the bundle's evaluate graph")
        return result


def evaluate_blob(blobs: Blobs, bundle: Bundle, test_set: BlobRef, model: BlobRef) -> Evaluation:
    """Evaluates a stored model on a stored test set. One thread at a time.

    Raises:
        ModelError: the model or the test set is not in the store.
        EdgeError: see :class:`TestSet`.
    """
    if not blobs.has(test_set.sha256):
        raise ModelError(f"the test set (blob {test_set.sha256[:12]}) is not in the store; submit the run again")
    opened = _open(blobs.path(test_set.sha256), bundle.path)
    return opened.evaluate(read_model(blobs, model, bundle.layout()))


@lru_cache(maxsize=2)  # both files are named by their content, so they never change; graphs load in tens of ms
def _open(test_set: Path, bundle: Path) -> TestSet:
    return TestSet(test_set, Bundle.open(bundle))
