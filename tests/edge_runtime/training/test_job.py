"""A job from request to update file."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.compression import Layout
from edge_runtime.compression.pipeline import CodecSpec, encode_model
from edge_runtime.data import DatasetConfig
from edge_runtime.errors import BundleError, CodecError, DataError, EdgeError, StorageError, TrainingError
from edge_runtime.training.job import JobRunner, failure_kind
from edge_runtime.training.state import codec_key, load_state
from tests.edge_runtime import toy_bundle
from tests.edge_runtime.toy_jobs import ToyJobs


def run_job(request, runner=None):
    return (runner or JobRunner()).run(request)


@pytest.fixture
def jobs(tmp_path):
    return ToyJobs(tmp_path)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_the_update_is_the_difference_to_the_received_model(jobs, codec):
    """The file is durable, its hash is right, and adding it to the model gives the trained weights."""
    done = run_job(jobs.request(codec=codec, hyper={"lr": 0.05}))
    parts = jobs.bundle.layout().split(jobs.delta(done))
    assert (parts["w"] != 0).any()
    np.testing.assert_allclose(parts["seen"], np.float32([0.5, 2]) ** 8 - 1, rtol=1e-5)
    assert (done.meta.round, done.meta.model_version, done.meta.samples, done.meta.steps) == (3, 4, 60, 8)
    assert done.dataset_samples == 60
    assert done.meta.evaluation is None  # nothing is held out
    assert [str(path) for path in jobs.out.iterdir()] == [done.path]


def test_training_lowers_the_loss_on_the_hold_out(jobs):
    """The received model is evaluated on samples that are never trained on."""
    runner = JobRunner()
    vector, losses = jobs.bundle.initial_vector(), []
    for assignment in "abc":
        done = run_job(jobs.request(assignment=assignment, holdout_fraction=0.3), runner)
        losses.append(done.meta.evaluation.loss_sum / done.meta.evaluation.samples)
        vector = vector + jobs.delta(done)
        jobs.write_model(vector)
    assert losses[0] > losses[1] > losses[2]
    assert done.meta.samples + done.meta.evaluation.samples == 60


def test_jobs_repeat_bit_for_bit_and_differ_by_device_and_assignment(jobs):
    """The same request gives the same bytes, in a fresh process or not."""
    runner = JobRunner()
    first = jobs.read(run_job(jobs.request(), runner))
    assert jobs.read(run_job(jobs.request(), runner)) == first
    assert jobs.read(run_job(jobs.request())) == first
    assert jobs.read(run_job(jobs.request(assignment="b"), runner)) != first
    assert jobs.read(run_job(jobs.request(seed=1), runner)) != first


def stopping_after(steps):
    """A stop that is asked after every step, and gives its reason from that many steps on."""
    asked = iter([""] * (steps - 1))
    return lambda: next(asked, "too hot")


@pytest.mark.parametrize(
    ("job", "after", "stands_for"),
    [
        ({"epochs": 2}, 1, 16),  # in the first pass: the samples that were seen
        ({"epochs": 2}, 3, 48),
        ({"epochs": 2}, 5, 60),  # after it: all
        ({"epochs": None, "steps": 40}, 2, 32),
        ({"epochs": None, "steps": 2}, 1, 30),  # the whole job is half a pass and stands for all: half of it for half
        ({"epochs": 1, "last_batch": "drop"}, 1, 20),  # one of three batches
    ],
)
def test_what_a_job_that_ended_early_stands_for(jobs, job, after, stands_for):
    """The update is what the steps until then made, it weighs the share of the samples that was seen, and says why."""
    whole = run_job(jobs.request(**job))
    assert (whole.meta.samples, whole.meta.stopped) == (60, "")
    done = JobRunner().run(jobs.request(**job), stop=stopping_after(after))
    assert (done.meta.steps, done.meta.samples, done.meta.stopped) == (after, stands_for, "too hot")
    shorter = run_job(jobs.request(**{**job, "epochs": None, "steps": after}))
    np.testing.assert_array_equal(jobs.delta(done), jobs.delta(shorter))


def test_a_job_that_was_at_its_last_step_was_not_stopped(jobs):
    """Training that did all its steps ended as it should, whatever was asked meanwhile; phases are told in order."""
    phases = []
    done = JobRunner().run(jobs.request(), stop=stopping_after(8), on_phase=phases.append)
    assert (done.meta.steps, done.meta.stopped, phases) == (8, "", ["train", "compress"])
    phases.clear()
    JobRunner().run(jobs.request(epochs=None), stop=lambda: "hot", on_phase=phases.append)
    assert phases == []


def test_what_a_lossy_codec_leaves_out_of_a_stopped_job_is_kept(jobs):
    """Sent and residual together are what was trained, as after any job."""
    options = {"codec": "topk", "codec_options": {"density": 0.2}}
    runner = JobRunner()
    request = jobs.request(epochs=3, **options)
    done = runner.run(request, stop=stopping_after(2))
    exact = jobs.delta(runner.run(jobs.request(epochs=3), stop=stopping_after(2)))
    spec = CodecSpec("topk", {"density": 0.2})
    state = load_state(Path(done.state_path), jobs.bundle.sha256, codec_key(jobs.bundle.sha256, spec)).codec
    layout = jobs.bundle.layout()
    buffer = np.concatenate([np.full(end - start, name in layout.buffers) for name, _, start, end in layout.spans()])
    kept = np.zeros(layout.size)
    kept[~buffer] += state.get("delta.feedback.residual", 0)
    kept[buffer] += state.get("delta.buffers.residual", 0)
    assert kept.any()
    np.testing.assert_allclose(jobs.delta(done) + kept, exact, atol=1e-6)


def test_a_job_without_epochs_and_steps_only_evaluates(jobs):
    """There is no update; without hold-out all samples count."""
    done = run_job(jobs.request(epochs=None))
    assert (done.path, done.sha256, done.size_bytes, done.meta.steps) == ("", "", 0, 0)
    assert done.meta.evaluation.samples == 60
    done = run_job(jobs.request(epochs=None, holdout_fraction=0.3))
    assert 0 < done.meta.evaluation.samples < 60
    assert not list(jobs.out.iterdir())


def test_evaluation_can_be_left_out(jobs):
    """A coordinator that does not want it does not cost the device the time."""
    assert run_job(jobs.request(evaluate=False, holdout_fraction=0.3)).meta.evaluation is None


def test_new_data_and_other_windows_are_seen_by_the_next_job(jobs):
    """What the runner keeps never makes a job use old data."""
    runner = JobRunner()
    assert run_job(jobs.request(), runner).meta.samples == 60
    toy_bundle.write_data(jobs.data, 70)
    assert run_job(jobs.request(), runner).meta.samples == 70
    assert run_job(jobs.request(max_samples=20), runner).meta.samples == 20
    timed = DatasetConfig(name="d", path=str(jobs.data), time="t")
    late = JobRunner(clock=lambda: 69.0)
    assert run_job(jobs.request(dataset=timed, max_age_s=10.0), late).meta.samples == 11


def test_another_bundle_replaces_the_loaded_one(jobs, tmp_path):
    """Two runs with different bundles may take turns in one worker."""
    (tmp_path / "o").mkdir()
    other = ToyJobs(tmp_path / "o", batch=16, mask=True)
    runner = JobRunner()
    first = jobs.read(run_job(jobs.request(), runner))
    run_job(other.request(), runner)
    assert jobs.read(run_job(jobs.request(), runner)) == first


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (lambda jobs: jobs.model.write_bytes(b"x"), CodecError, "model: these bytes are no update or model"),
        (lambda jobs: jobs.model.write_bytes(bytes(10_000_000)), CodecError, "more than a model of 17 numbers"),
        (lambda jobs: jobs.model.unlink(), StorageError, "model: cannot be read"),
        (lambda jobs: jobs.write_other_model(), CodecError, "made for other tensors"),
        (lambda jobs: jobs.data.unlink(), DataError, "does not exist"),
        (lambda jobs: jobs.bundle.path.write_bytes(b"x"), BundleError, "no bundle or cut off"),
    ],
)
def test_what_is_missing_or_damaged_is_named(jobs, damage, error, reason):
    """Each kind of trouble has its kind of error, and no file is left."""

    def other_model():
        jobs.model.write_bytes(encode_model(np.zeros(3, np.float32), Layout(("w",), ((3,),))))

    jobs.write_other_model = other_model
    damage(jobs)
    with pytest.raises(error, match=reason) as caught:
        run_job(jobs.request())
    assert "\n" not in str(caught.value)
    assert failure_kind(caught.value) != "internal"
    assert not list(jobs.out.iterdir())


def test_another_bundle_than_the_jobs_is_refused(jobs):
    """The hash in the job is the identity of the model."""
    request = jobs.request()
    toy_bundle.write_bundle(jobs.bundle.path, created_by="someone else")
    with pytest.raises(BundleError, match="is not the bundle of the job"):
        run_job(request)


def test_a_full_disk_leaves_no_partial_update(jobs, monkeypatch):
    """The failure is one of storage, and what was written of the file is gone."""
    real = os.write

    def full(fd, data):
        if len(data) > 50:
            real(fd, bytes(data[:10]))
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="no space left on the device") as caught:
        run_job(jobs.request())
    assert failure_kind(caught.value) == "storage"
    assert not list(jobs.out.iterdir())


def test_a_job_that_cannot_be_kept_within_its_terms_is_refused(jobs):
    """Split training and budgets that cannot be met are told, not ignored."""
    with pytest.raises(TrainingError, match="cut 'cut-1', but this software does not train split models"):
        run_job(jobs.request(cut="cut-1"))
    with pytest.raises(CodecError, match="with codec 'raw', but 50 are allowed"):
        run_job(jobs.request(byte_budget=50))
    assert not list(jobs.out.iterdir())


def test_a_huge_batch_size_costs_no_more_than_the_data(jobs):
    """One batch of all samples, whatever the job says."""
    assert run_job(jobs.request(batch_size=10**15)).meta.steps == 2


def test_kinds_of_failure():
    """What is not foreseen is internal."""
    assert failure_kind(EdgeError("x")) == "internal"
    assert failure_kind(ZeroDivisionError()) == "internal"
    assert failure_kind(OSError(errno.ENOSPC, "full")) == "storage"
