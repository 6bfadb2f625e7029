"""The model of a job: whole, as a snapshot, or made from a held version and changes; the same bits on every way."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, decode, encode
from edge_runtime.errors import CodecError, StorageError
from edge_runtime.messages import ModelRef
from edge_runtime.store.models import HeldModels
from edge_runtime.training.job import JobRunner
from tests.edge_runtime.toy_jobs import ToyJobs

CODECS = ["raw", "zstd", "int8", "topk"]


class Run:
    """A coordinator's side of a run: shared models by version, the changes between them, and what a device is sent."""

    def __init__(self, folder: Path, codec: str = "zstd") -> None:
        self.jobs = ToyJobs(folder)
        self.layout = self.jobs.bundle.layout()
        self.held = HeldModels(folder / "models")
        self.runner = JobRunner()
        self.models = [SharedModel.start(self.jobs.bundle.initial_vector(), self.layout)]
        self.changes: list[bytes] = []
        rng = np.random.default_rng(3)
        for version in range(6):
            before = self.models[-1]
            wanted = {MODEL_CHANNEL: (rng.normal(size=self.layout.size) * 0.05).astype(np.float32)}
            data = encode(
                CodecSpec(codec),
                wanted,
                {MODEL_CHANNEL: self.layout},
                base_version=version,
                reference=before.vector,
            ).data
            sent = decode(data, {MODEL_CHANNEL: self.layout}, reference=before.vector)[MODEL_CHANNEL]
            self.models.append(before.plus(sent.vector()))
            self.changes.append(data)

    def request(self, version: int, base: int | None, assignment: str = "a", **fields):
        """A job of ``version`` for a device that has ``base``; None: by a snapshot."""
        blobs = [self.models[version].encode()] if base is None else self.changes[base:version]
        paths = []
        for number, data in enumerate(blobs):
            paths.append(self.jobs.folder / f"blob-{version}-{base}-{number}")
            paths[-1].write_bytes(data)
        blob = self.jobs.request().job.bundle
        model = ModelRef(base=base, blobs=[blob] * len(paths), vector_sha256=self.models[version].sha256())
        request = self.jobs.request(model_version=version, model=model, assignment=assignment, **fields)
        return msgspec.structs.replace(request, model_paths=[str(path) for path in paths])

    def do(self, *args, **fields):
        return self.runner.run(self.request(*args, **fields))

    def versions(self) -> set[int]:
        return {version for version in range(1, 7) if self.held.path("r", version).exists()}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.mark.parametrize("codec", CODECS)
def test_every_way_leads_to_the_same_model(tmp_path, codec):
    """By the chain from the bundle, by single changes, by the held version itself or by a snapshot: training starts
    from the same bits, so it gives the same update."""
    run = Run(tmp_path, codec)
    whole = run.jobs.delta(run.do(3, None))
    run.held.drop("r", 3)
    np.testing.assert_array_equal(run.jobs.delta(run.do(3, 0)), whole)
    np.testing.assert_array_equal(run.jobs.delta(run.do(3, 3)), whole)
    run.held.drop("r", 3)
    for version in (1, 2, 3):
        done = run.do(version, version - 1)
    np.testing.assert_array_equal(run.jobs.delta(done), whole)
    assert run.versions() == {2, 3}


def test_what_a_job_leaves_is_where_the_next_one_starts(run):
    """Training and evaluation alike leave their version; what that took of the flash is told."""
    done = run.do(0, 0)
    assert run.versions() == set()
    assert done.meta.written_bytes == done.size_bytes
    done = run.do(1, 0, epochs=None)
    assert run.versions() == {1}
    assert done.meta.written_bytes == run.held.path("r", 1).stat().st_size
    done = run.do(2, 1)
    assert run.versions() == {1, 2}
    assert done.meta.written_bytes == done.size_bytes + run.held.path("r", 2).stat().st_size
    done = run.do(2, 2, assignment="b")
    assert done.meta.written_bytes == done.size_bytes
    assert run.do(5, None).meta.written_bytes == done.size_bytes  # the blob itself is the held file
    assert run.versions() == {2, 5}


def test_a_job_that_fails_leaves_the_versions_as_they_were(run):
    """The coordinator takes nothing to be held after a failure; what is held stays until a job succeeds."""
    run.do(1, 0)
    with pytest.raises(CodecError, match="codec 'raw', but 10 are allowed"):
        run.do(2, 1, byte_budget=10)
    assert run.versions() == {1}


@pytest.mark.parametrize(
    ("damage", "error", "said", "left"),
    [
        (lambda run, _: run.held.drop("r", 2), StorageError, "model version 2 of run 'r' is not on this", set()),
        (lambda run, _: run.held.path("r", 2).write_bytes(b"x"), CodecError, r"2\.model: these bytes are no", set()),
        (lambda _, paths: paths[1].write_bytes(paths[0].read_bytes()), CodecError, "relative to model version 2", {2}),
        (lambda _, paths: paths[0].write_bytes(paths[0].read_bytes()[:-1]), CodecError, "damaged", {2}),
        (lambda _, paths: paths[0].write_bytes(bytes(10_000_000)), CodecError, "more than a model of 17", {2}),
        (lambda _, paths: paths[0].unlink(), StorageError, "cannot be read", {2}),
    ],
)
def test_what_is_missing_or_damaged_ends_the_job(run, damage, error, said, left):
    """Nothing is trained from a model that is not the coordinator's, and what is damaged here is not held any more."""
    run.do(2, 0)
    request = run.request(4, 2)
    damage(run, [Path(path) for path in request.model_paths])
    files = set(run.jobs.out.iterdir())
    with pytest.raises(error, match=said):
        run.runner.run(request)
    assert run.versions() == left
    assert set(run.jobs.out.iterdir()) == files


def test_another_result_than_the_coordinators_is_refused(run):
    """A held model of another run with the same name is found out by the hash of what comes out."""
    run.do(2, 0)
    other = SharedModel.start(np.full(run.layout.size, 0.5, np.float32), run.layout)
    run.held.keep("r", 2, other.encode())
    with pytest.raises(CodecError, match="version 3, made from version 2 and 1 changes, has another hash"):
        run.do(3, 2)
    request = run.request(3, None)
    model = msgspec.structs.replace(request.job.model, vector_sha256="0" * 64)
    with pytest.raises(CodecError, match="made from a snapshot, has another hash"):
        run.runner.run(msgspec.structs.replace(request, job=msgspec.structs.replace(request.job, model=model)))


def test_a_whole_model_as_it_is_leaves_nothing(run):
    """Without a shared model there is no version to hold."""
    run.runner.run(run.jobs.request())
    assert not run.held.folder.exists()
