"""Training jobs on the toy bundle, with real files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.agent.pipe import TrainRequest
from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import CodecSpec, decode, encode
from edge_runtime.data import DatasetConfig
from edge_runtime.messages import BlobRef, Job, ModelRef
from tests.edge_runtime import toy_bundle

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.agent.pipe import Trained


class ToyJobs:
    """A bundle, a model and a dataset in one folder."""

    def __init__(self, folder: Path, *, samples: int = 60, **bundle: Any) -> None:
        self.folder = folder
        self.bundle = Bundle.open(toy_bundle.write_bundle(folder / "toy.bundle", **bundle))
        self.model = folder / "model"
        self.write_model(self.bundle.initial_vector())
        self.data = toy_bundle.write_data(folder / "d.npz", samples)
        self.out = folder / "out"
        self.out.mkdir()

    def write_model(self, vector: np.ndarray, **beside: np.ndarray) -> None:
        """Stores a received model and what came with it, as a new file: blobs are never changed in place."""
        self.model.unlink(missing_ok=True)
        vectors = {"model": vector, **beside}
        data = encode(CodecSpec("raw"), vectors, dict.fromkeys(vectors, self.bundle.layout())).data
        self.model.write_bytes(data)

    def request(self, *, dataset: DatasetConfig | None = None, threads: int = 1, **job: Any) -> TrainRequest:
        """A request; ``job`` replaces fields of the job. The model is the one stored unless ``model`` is given."""
        blob = BlobRef(sha256=self.bundle.sha256, size_bytes=1)
        fields = {"run": "r", "assignment": "a", "round": 3, "model_version": 4, "dataset": "d", "deadline_s": 9.0}
        defaults = {"epochs": 2, "batch_size": 16, "bundle": blob, "model": ModelRef(blobs=[blob])}
        return TrainRequest(
            job=Job(**{**fields, **defaults, **job}),
            device="pi",
            bundle_path=str(self.bundle.path),
            model_paths=[str(self.model)],
            output_folder=str(self.out),
            dataset=dataset or DatasetConfig(name="d", path=str(self.data)),
            models_folder=str(self.folder / "models"),
            threads=threads,
        )

    def read(self, done: Trained) -> bytes:
        """The update's bytes, after checking what was said about them."""
        data = Path(done.path).read_bytes()
        assert len(data) == done.size_bytes
        assert toy_bundle.sha256(data) == done.sha256
        return data

    def delta(self, done: Trained, channel: str = "delta") -> np.ndarray:
        """What an update holds, float32 ``[layout.size]``."""
        return decode(self.read(done), {channel: self.bundle.layout()})[channel].vector()

    def after(self, done: Trained, request: TrainRequest) -> TrainRequest:
        """The request with the run's state as it is after ``done``."""
        return msgspec.structs.replace(request, state_path=done.state_path)
