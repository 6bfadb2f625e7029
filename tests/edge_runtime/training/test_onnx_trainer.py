"""Training with onnxruntime: the numbers are those of the textbook, and every refusal names the cure."""

import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.bundle import manifest as m
from edge_runtime.data.npz import NpzSnapshot
from edge_runtime.data.view import View, Window
from edge_runtime.errors import BundleError, DataError, TrainingError
from edge_runtime.training.base import TrainSettings
from edge_runtime.training.onnx_trainer import OnnxTrainer
from edge_runtime.training.schedule import BatchRule, batches, job_seed, total_steps
from tests.edge_runtime import toy_bundle

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype(np.float32)
Y = np.argmax(X[:, :3], axis=1)


def make(tmp_path, batch=None, *, x=X, y=Y, mask=False, holdout=0.0, **changes):
    bundle = Bundle.open(toy_bundle.write_bundle(tmp_path / "toy.bundle", batch, mask=mask, **changes))
    trainer = OnnxTrainer()
    trainer.load(bundle)
    view = View("d", NpzSnapshot(x, y, None, None), bundle.manifest, Window(holdout))
    return trainer, view, bundle.initial_vector()


def textbook(vector, orders, rate=0.1, momentum=0.9):
    """Softmax regression with momentum in plain numpy, float64."""
    w, b, seen = (part.astype(np.float64) for part in (vector[:12].reshape(4, 3), vector[12:15], vector[15:]))
    vw, vb, losses = np.zeros_like(w), np.zeros_like(b), []
    for rows in orders:
        z = X[rows] @ w + b
        logp = z - np.log(np.exp(z).sum(1, keepdims=True))
        losses.append(-logp[np.arange(len(rows)), Y[rows]].mean())
        d = (np.exp(logp) - np.eye(3)[Y[rows]]) / len(rows)
        vw, vb = momentum * vw + X[rows].T @ d, momentum * vb + d.sum(0)
        w, b, seen = w - rate * vw, b - rate * vb, seen * [0.5, 2.0]
    return np.concatenate([w.ravel(), b, seen]), losses


def settings(**more):
    return TrainSettings(**{"epochs": 2, "batch_size": 16, "seed": 7, **more})


KEEP = BatchRule()


def orders(rule=KEEP, **more):
    return list(batches(50, settings(**more), rule))


@pytest.mark.parametrize("path", ["fused", "gradients"])
@pytest.mark.parametrize(("batch", "mask"), [(None, False), (16, True), (16, False)])
def test_training_is_the_textbooks(tmp_path, path, batch, mask):
    """Both paths, all kinds of batches: weights and loss agree with numpy, the last partial batch included."""
    trainer, view, start = make(tmp_path, batch, mask=mask)
    hook = None if path == "fused" else lambda gradient, _weights, _gradient_at: gradient
    rows = orders(BatchRule(drop=batch is not None and not mask))
    expected, losses = textbook(start, rows)
    result = trainer.train(start, view, settings(), gradient=hook)
    np.testing.assert_allclose(result.vector, expected, rtol=2e-5, atol=2e-6)
    weights = [len(row) for row in rows]
    assert result.loss == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
    assert result.loss_rms == pytest.approx(np.sqrt(np.average(np.square(losses), weights=weights)), rel=1e-5)
    assert (result.steps, result.samples) == (len(rows), 50)


def test_a_job_leaves_nothing_behind_for_the_next(tmp_path):
    """Slots and counters start anew: the same job gives the same bits again, whatever came between."""
    trainer, view, start = make(tmp_path)
    first = trainer.train(start, view, settings()).vector.copy()
    trainer.train(start + 1, view, settings(epochs=None, steps=3, batch_size=7, hyper={"lr": 0.5}))
    trainer.evaluate(start, view, view.train, 13)
    np.testing.assert_array_equal(trainer.train(start, view, settings()).vector, first)
    np.testing.assert_array_equal(make(tmp_path)[0].train(start, view, settings()).vector, first)


def test_seeds_decide_the_order(tmp_path):
    """Another seed gives another order; device and assignment are part of the seed."""
    trainer, view, start = make(tmp_path)
    first = trainer.train(start, view, settings()).vector.copy()
    assert (trainer.train(start, view, settings(seed=8)).vector != first).any()
    assert len({job_seed(1, "a", "b"), job_seed(1, "b", "b"), job_seed(1, "a", "c"), job_seed(2, "a", "b")}) == 4
    assert job_seed(1, "a", "b", 0) == job_seed(1, "a", "b") != job_seed(1, "a", "b", 1)


def test_hyper_parameters_reach_the_optimiser(tmp_path):
    """A job may change what the bundle made an input, and the next job gets the defaults again."""
    trainer, view, start = make(tmp_path)
    expected, _ = textbook(start, orders(), rate=0.01, momentum=0.5)
    np.testing.assert_allclose(
        trainer.train(start, view, settings(hyper={"lr": 0.01, "momentum": 0.5})).vector, expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        trainer.train(start, view, settings()).vector, textbook(start, orders())[0], rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [
        ({"hyper": {"rate": 1.0}}, TrainingError, "no hyper-parameter 'rate'; it has lr, momentum"),
        ({"hyper": {"lr": float("nan")}}, TrainingError, "'lr' is nan; give a finite number"),
        ({"hyper": {"lr": 1e39}}, TrainingError, "'lr' is 1e\\+39"),
        ({"steps": 3}, TrainingError, "exactly one of epochs and steps"),
        ({"batch_size": 64, "last_batch": "drop"}, DataError, "dataset 'd': 50 samples are fewer than one batch of 64"),
        (
            {"hyper": {"lr": 1e38}, "epochs": 9},
            TrainingError,
            r"(loss is (nan|inf)|NaN or infinite).*lower the learning rate \(now 1e\+38\)",
        ),
    ],
)
def test_jobs_that_cannot_be_trained_say_why(tmp_path, more, error, reason):
    """One line with the name of the setting and the cure."""
    trainer, view, start = make(tmp_path)
    with pytest.raises(error, match=reason):
        trainer.train(start, view, settings(**more))


def test_divergence_names_the_step(tmp_path):
    """Training stops at the first loss that is not finite."""
    trainer, view, start = make(tmp_path)
    hook = lambda gradient, _weights, _gradient_at: gradient * np.float32(1e30)  # noqa: E731
    with pytest.raises(TrainingError, match=r"(loss is|weights are) .* step \d of 8"):
        trainer.train(start, view, settings(hyper={"lr": 1e20}), gradient=hook)


def test_a_fixed_batch_is_not_quietly_changed(tmp_path):
    """The plan's batch size and the bundle's must agree."""
    trainer, view, start = make(tmp_path, 16)
    with pytest.raises(TrainingError, match="takes batches of 16 only, the job asks for 32; set batch_size = 16"):
        trainer.train(start, view, settings(batch_size=32))


def test_a_fixed_batch_larger_than_the_data_is_an_error_of_the_data(tmp_path):
    """Without a mask a partial batch cannot be trained on; with one it can."""
    trainer, view, start = make(tmp_path, 16, x=X[:9], y=Y[:9])
    with pytest.raises(DataError, match="9 samples are fewer than one batch of 16, and partial batches are dropped"):
        trainer.train(start, view, settings())
    trainer, view, start = make(tmp_path, 16, mask=True, x=X[:9], y=Y[:9])
    assert trainer.train(start, view, settings()).steps == 2


def test_batch_statistics_need_their_minimum():
    """A last batch of one sample is left out where the model cannot train on it."""
    rule = BatchRule(minimum=2)
    assert [len(rows) for rows in batches(33, settings(epochs=1), rule)] == [16, 16]
    assert [len(rows) for rows in batches(34, settings(epochs=1), rule)] == [16, 16, 2]
    with pytest.raises(TrainingError, match="batch_size 1 is too small"):
        total_steps(33, settings(batch_size=1), rule)


def test_steps_go_on_into_the_next_epoch():
    """Each epoch visits every sample once before any comes again."""
    rows = list(batches(50, settings(epochs=None, steps=9), BatchRule()))
    assert [len(row) for row in rows] == [16, 16, 16, 2] * 2 + [16]
    assert sorted(np.concatenate(rows[:4])) == list(range(50))


def test_an_empty_training_set_is_named(tmp_path):
    """All samples held out leaves nothing to train on."""
    trainer, view, start = make(tmp_path, x=X[:1], y=Y[:1])
    view.train = view.train[:0]
    with pytest.raises(DataError, match="dataset 'd': no samples are left to train on"):
        trainer.train(start, view, settings())


def test_a_bad_sample_stops_training_by_name(tmp_path):
    """NaN in the data never reaches the weights."""
    bad = X.copy()
    bad[33, 1] = np.nan
    trainer, view, start = make(tmp_path, x=bad)
    with pytest.raises(DataError, match="x of sample 33 is NaN"):
        trainer.train(start, view, settings())


@pytest.mark.parametrize(
    ("batch", "mask", "counted"), [(None, False, 50), (16, True, 50), (16, False, 48), (64, True, 50)]
)
def test_evaluation_sums_exactly(tmp_path, batch, mask, counted):
    """Sums over all samples, padded ones not counted; a fixed batch without mask leaves the rest out."""
    trainer, view, start = make(tmp_path, batch, mask=mask)
    z = X[:counted] @ start[:12].reshape(4, 3) + start[12:15]
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    result = trainer.evaluate(start, view, view.train, 20)
    assert result.samples == counted
    assert result.correct == (z.argmax(1) == Y[:counted]).sum()
    assert result.loss_sum == pytest.approx(-logp[np.arange(counted), Y[:counted]].sum(), rel=1e-5)
    assert trainer.evaluate(start, view, view.train[:0], 20) is None


def test_the_hook_sees_gradient_and_weights(tmp_path):
    """What the hook returns is what the optimiser applies; buffers have no gradient."""
    trainer, view, start = make(tmp_path)
    seen = []

    def hook(gradient, weights, _gradient_at):
        seen.append((gradient.copy(), weights.copy()))
        gradient[15:] = 99
        return np.zeros_like(gradient)

    result = trainer.train(start, view, settings(epochs=1), gradient=hook)
    np.testing.assert_array_equal(result.vector[:15], start[:15])
    assert (seen[0][0][:12] != 0).all()
    assert all((gradient[15:] == 0).all() for gradient, _ in seen)
    np.testing.assert_array_equal(seen[0][1], start)


def gradient_of(vector, rows):
    """Of the mean loss, float64, in layout order."""
    return np.concatenate([(vector - textbook(vector, [rows], rate=1.0, momentum=0.0)[0])[:15], [0, 0]])


@pytest.mark.parametrize(("batch", "mask"), [(None, False), (16, True)])
def test_the_hook_may_ask_for_the_gradient_at_other_weights(tmp_path, batch, mask):
    """It is that of the same batch, and training goes on as if nothing had been asked."""
    trainer, view, start = make(tmp_path, batch, mask=mask)
    other = (start + 0.3).astype(np.float32)
    here, there = [], []

    def hook(gradient, weights, gradient_at):
        there.append(gradient_at(other))
        here.append((gradient.copy(), gradient_at(weights)))
        return gradient

    plain = trainer.train(start, view, settings(), gradient=lambda gradient, _weights, _at: gradient).vector.copy()
    result = trainer.train(start, view, settings(), gradient=hook)
    np.testing.assert_array_equal(result.vector, plain)
    for rows, found, (mine, again) in zip(orders(), there, here, strict=True):
        np.testing.assert_allclose(found, gradient_of(other, rows), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(mine, again)


@pytest.mark.parametrize(("batch", "mask"), [(None, False), (16, True)])
def test_a_pass_without_steps_gives_the_gradient_over_all_samples(tmp_path, batch, mask):
    """Partial batches weigh by their samples; the weights stay as they are."""
    trainer, view, start = make(tmp_path, batch, mask=mask)
    said = []
    result = trainer.full_gradient(start, view, settings(epochs=None, steps=3), on_step=lambda *step: said.append(step))
    np.testing.assert_allclose(result.vector, gradient_of(start, np.arange(50)), rtol=1e-4, atol=1e-6)
    assert (result.steps, result.samples, result.stopped) == (0, 50, "")
    assert [step[:2] for step in said] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.loss_rms >= result.loss > 0
    early = trainer.full_gradient(start, view, settings(), stop=lambda: "too hot")
    assert (early.samples, early.stopped) == (16, "too hot")
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at batch 1 of 4|gradient is NaN"):
        trainer.full_gradient(np.full_like(start, np.float32(3e38)), view, settings())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer": m.Optimizer(name="sgd", hyper={"lr": 0.1})}, "wants an input"),
        (
            {"optimizer": m.Optimizer(name="sgd", hyper={"lr": 0.1, "momentum": 0.9}, slots=[
                m.Slot(name="w", shape=(3, 4)), m.Slot(name="b", shape=(3,))])},
            r"input 's.w' is float32 \[4, 3\], the manifest gives float32 \[3, 4\]",
        ),
    ],
)  # fmt: skip
def test_graphs_that_do_not_fit_the_manifest_are_refused(tmp_path, changes, reason):
    """A bundle that contradicts itself fails before anything is trained."""
    trainer, view, start = make(tmp_path, **changes)
    with pytest.raises(BundleError, match=reason):
        trainer.train(start, view, settings())


def test_a_graph_that_onnxruntime_refuses_is_the_bundles_fault(tmp_path):
    """The engine's own words come as one line."""
    content = toy_bundle.files()
    manifest = toy_bundle.manifest(content)
    content["train.onnx"] = content["train.onnx"].replace(b"LogSoftmax", b"LogSoftmix")
    files = {k: m.FileEntry(sha256=toy_bundle.sha256(v), size_bytes=len(v)) for k, v in content.items()}
    manifest = toy_bundle.m.msgspec.structs.replace(manifest, files=files)
    path = toy_bundle.write_zip(tmp_path / "x.bundle", {m.MANIFEST_NAME: m.encode_manifest(manifest), **content})
    trainer, view, start = make(tmp_path)
    trainer.load(Bundle.open(path))
    with pytest.raises(BundleError, match=r"graph 'train': onnxruntime .* refuses it: .*LogSoftmix") as caught:
        trainer.train(start, view, settings())
    assert "\n" not in str(caught.value)
