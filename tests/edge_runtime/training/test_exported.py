"""Bundles made by the exporter train here as they do in torch."""

import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.data.npz import NpzSnapshot
from edge_runtime.data.view import View, Window
from edge_runtime.training.base import TrainSettings
from edge_runtime.training.onnx_trainer import OnnxTrainer

torch = pytest.importorskip("torch")
exporters = pytest.importorskip("exporters")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 1, 8, 8)).astype(np.float32)
Y = RNG.integers(0, 4, 70)
HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.001}


def network(*, dropout=False):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Flatten()]
    if dropout:
        layers.append(torch.nn.Dropout(0.5))
    return torch.nn.Sequential(*layers, torch.nn.Linear(384, 4))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.bundle"
    exporters.export_bundle(network(), torch.from_numpy(X[:16]), path, name="net", parity=False)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "gradients"])
def test_an_exported_model_trains_as_in_torch(exported, path):
    """Two epochs with a partial last batch: weights, running statistics and loss agree."""
    bundle = Bundle.open(exported)
    trainer = OnnxTrainer()
    trainer.load(bundle)
    view = View("d", NpzSnapshot(X, Y, None, None), bundle.manifest, Window())
    settings = TrainSettings(epochs=2, batch_size=16, hyper=HYPER)
    hook = None if path == "fused" else lambda gradient, _weights, _gradient_at: gradient
    in_order = lambda count, _rng: np.arange(count)  # noqa: E731
    result = trainer.train(bundle.initial_vector(), view, settings, gradient=hook, sampler=in_order)

    module = network()
    optimizer = torch.optim.SGD(module.parameters(), **HYPER)
    for _ in range(2):
        for start in range(0, 70, 16):
            optimizer.zero_grad()
            batch, target = torch.from_numpy(X[start : start + 16]), torch.from_numpy(Y[start : start + 16])
            torch.nn.functional.cross_entropy(module(batch), target).backward()
            optimizer.step()
    wanted = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    got = bundle.layout().split(result.vector)
    assert set(got) == {name for name in wanted if name != "1.num_batches_tracked"}
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor, wanted[name], atol=2e-4, err_msg=name)

    module.eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(X))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(Y), reduction="sum").item()
    evaluation = trainer.evaluate(result.vector.copy(), view, view.train, 16)
    assert evaluation.loss_sum == pytest.approx(loss, rel=1e-3)
    assert evaluation.samples == 70


@pytest.mark.slow
def test_dropout_follows_the_seed(tmp_path):
    """The same seed drops the same units, another seed others."""
    path = tmp_path / "drop.bundle"
    exporters.export_bundle(network(dropout=True), torch.from_numpy(X[:16]), path, name="drop", parity=False)
    bundle = Bundle.open(path)
    trainer = OnnxTrainer()
    trainer.load(bundle)
    view = View("d", NpzSnapshot(X, Y, None, None), bundle.manifest, Window())
    in_order = lambda count, _rng: np.arange(count)  # noqa: E731

    def run(seed):
        settings = TrainSettings(epochs=1, batch_size=16, seed=seed)
        return trainer.train(bundle.initial_vector(), view, settings, sampler=in_order).vector.copy()

    first = run(1)
    np.testing.assert_array_equal(run(1), first)
    assert (run(2) != first).any()
