"""Losses, optimisers, frozen parameters, dropout and partial batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from exporters import ExportError, _random
from tests.exporters.conftest import convolutional, dropout_network
from tests.exporters.runner import Device


def batch(*shape, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal(shape).astype(np.float32), generator.integers(0, classes, shape[0])


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        ("binary_cross_entropy_with_logits", 1),
        ("binary_cross_entropy_with_logits", 3),
        ("mean_squared_error", 2),
        ("cross_entropy", 4),
    ],
)
def test_losses_equal_torch(export, loss, outputs):
    """Each loss trains and evaluates as torch's; evaluation counts hits for classification only."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))
    device = Device(export(module, torch.randn(6, 5), loss=loss).path)
    x = torch.randn(9, 5)
    logits = module(x).detach()
    if loss == "cross_entropy":
        y = torch.randint(0, outputs, (9,))
        expected, right = functional.cross_entropy(logits, y), (logits.argmax(1) == y).sum()
    elif loss == "mean_squared_error":
        y = torch.randn(9, outputs)
        expected, right = functional.mse_loss(logits, y), None
    else:
        y = torch.randint(0, 2, (9, outputs)).float()
        expected = functional.binary_cross_entropy_with_logits(logits, y)
        right = ((logits > 0) == (y > 0.5)).float().mean(1).sum()
    got = device.run("evaluate", x=x.numpy(), y=y.numpy())
    assert got["loss_sum"] == pytest.approx(9 * expected.item(), rel=1e-5)
    assert got["count"] == 9
    assert got.get("correct") == (pytest.approx(right.item()) if right is not None else None)
    assert device.run("train", x=x.numpy(), y=y.numpy())["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_large_logits_stay_finite(export):
    """The binary loss is computed in a form that does not overflow."""
    module = nn.Linear(1, 1)
    path = export(module, torch.randn(4, 1), loss="binary_cross_entropy_with_logits").path
    x = np.asarray([[1e4], [-1e4]], np.float32)
    outputs = Device(path).run("gradients", x=x, y=np.asarray([[0.0], [1.0]], np.float32))
    assert all(np.isfinite(value).all() for value in outputs.values())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_equal_torch(export, name):
    """Five steps from the file, with weight decay and clipping, end where torch.optim ends."""
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    hyper = {"lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.5}
    report = export(module, torch.randn(8, 6), optimizer=name, hyper=hyper)
    assert report.parity.update < 1e-6
    device = Device(report.path)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    options = {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999), "eps": 1e-8}
    module = copy.deepcopy(module)
    optimizer = kind(module.parameters(), lr=0.01, weight_decay=0.1, **options)
    x, y = batch(8, 6)
    for _ in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        device.train(x=x, y=y)
    for key, value in module.named_parameters():
        np.testing.assert_allclose(device.state[f"p.{key}"], value.detach().numpy(), atol=2e-6)


def test_clipping_off_leaves_every_bit(convolutional_report):
    """With clip_norm 0 the update is that of a norm no gradient reaches; a small norm changes it."""
    device = Device(convolutional_report.path)
    x, y = batch(4, 2, 8, 8, classes=4)
    off, large, small = (device.run("train", x=x, y=y, clip_norm=norm) for norm in (0.0, 1e30, 1e-3))
    assert all(np.array_equal(off[name], large[name]) for name in off)
    assert not np.array_equal(off["new.p.5.weight"], small["new.p.5.weight"])


def test_fused_step_is_gradients_then_update(convolutional_report):
    """train.onnx equals gradients.onnx followed by update.onnx."""
    device = Device(convolutional_report.path)
    x, y = batch(4, 2, 8, 8, classes=4)
    fused = device.run("train", x=x, y=y)
    halves = device.run("gradients", x=x, y=y)
    given = {name: value for name, value in halves.items() if name.startswith("g.")}
    halves = {**halves, **device.run("update", **given)}
    for name, value in fused.items():
        np.testing.assert_allclose(value, halves[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_zero_gradients_stay_finite(export, name):
    """Adam divides by the root of a zero second moment: eps must survive the export."""
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        module[0].bias.fill_(-1e6)  # every unit is dead, so the first layer gets no gradient
    device = Device(export(module, torch.randn(4, 4), optimizer=name).path)
    x, y = batch(4, 4)
    for _ in range(3):
        device.train(x=x, y=y)
    assert all(np.isfinite(value).all() for value in device.state.values())
    assert not device.state["s.exp_avg_sq.0.weight"].any()
    assert device.state["s.exp_avg_sq.2.bias"].any()


def test_frozen_parameters_do_not_move(export):
    """Only the chosen prefix is trained; BatchNorm of the frozen part still follows the data, as in torch."""
    module = convolutional()
    report = export(module, torch.randn(8, 2, 8, 8), trainable=["5."])
    assert report.trainable_parameters == 128 * 4 + 4
    device = Device(report.path)
    assert [slot.name for slot in device.manifest.optimizer.slots] == ["momentum.5.weight", "momentum.5.bias"]
    assert not [name for name in device.manifest.graphs["gradients"].outputs if name.startswith("g.0")]
    before = dict(device.state)
    device.train(**dict(zip("xy", batch(4, 2, 8, 8, classes=4), strict=True)))
    changed = {name for name, value in device.state.items() if not np.array_equal(value, before[name])}
    assert {name for name in changed if name.startswith("p.")} == {
        "p.5.weight",
        "p.5.bias",
        "p.1.running_mean",
        "p.1.running_var",
    }


def test_frozen_by_requires_grad(export):
    """requires_grad decides when nothing else is said."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    module[0].weight.requires_grad_(False)
    manifest = Device(export(module, torch.randn(4, 4)).path).manifest
    assert {entry.name for entry in manifest.parameters if not entry.trainable} == {"0.weight"}


def test_parameter_without_influence_is_kept_and_reported(export):
    """torch leaves such a parameter alone, even under weight decay; so does the bundle, and it says so."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    report = export(Unused(), torch.randn(4, 4))
    assert any("spare.weight" in note for note in report.notes)
    trained = {entry.name for entry in Device(report.path).manifest.parameters if entry.trainable}
    assert trained == {"used.weight", "used.bias"}


def test_counter_buffers_are_carried_not_trained(convolutional_report):
    """num_batches_tracked is in the parameter table and in no graph."""
    manifest = Device(convolutional_report.path).manifest
    counter = next(entry for entry in manifest.parameters if entry.name == "1.num_batches_tracked")
    assert (counter.dtype, counter.buffer, counter.trainable) == ("int64", True, False)
    names = {name for graph in manifest.graphs.values() for name in (*graph.inputs, *graph.outputs)}
    assert not [name for name in names if "num_batches_tracked" in name]


# Dropout ------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_seed(dropout_report):
    """Equal seeds give equal steps, different seeds different ones; evaluation has no seed at all."""
    assert dropout_report.parity.gradients < 1e-5
    device = Device(dropout_report.path)
    x, y = batch(8, 6)
    one, again, other = (device.run("train", x=x, y=y, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert one["loss"] != other["loss"]
    assert "seed" in device.manifest.graphs["gradients"].inputs
    assert "seed" not in device.manifest.graphs["evaluate"].inputs


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_mask_statistics(keep):
    """Keep rate, independence of neighbours, of streams and of seeds, each within five standard errors."""
    like = torch.empty(400, 500)
    seeds = (0, 1, 2**40 + 1, -3)
    masks = {
        (seed, stream): _random.bernoulli(like, torch.tensor(seed), stream, keep).numpy()
        for seed in seeds
        for stream in (0, 1)
    }
    limit = 5 / np.sqrt(like.numel())
    for mask in masks.values():
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert abs(mask.mean() - keep) < limit * np.sqrt(keep * (1 - keep))
        flat = mask.reshape(-1)
        for lag in (1, 2, 3, 64, 500, 512, 4096):
            assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < limit
        assert np.abs(mask.mean(0) - keep).max() < 5 * np.sqrt(keep * (1 - keep) / 400)
    keys = list(masks)
    for index, one in enumerate(keys):
        for other in keys[index + 1 :]:
            assert abs(np.corrcoef(masks[one].reshape(-1), masks[other].reshape(-1))[0, 1]) < limit, (one, other)


def test_graph_draws_the_masks_of_the_reference(export):
    """The mask seen through the graph is `_random.bernoulli` to the bit, for negative and large seeds too."""

    class Show(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 50))

        def forward(self, x):
            return functional.dropout(x * self.scale, 0.25, self.training)

    report = export(Show(), torch.ones(6, 50), loss="mean_squared_error", parity=False)
    device = Device(report.path)
    x = np.ones((6, 50), np.float32)
    for seed in (0, 7, -1, 2**62 + 12345):
        # d loss / d scale = mean over 300 elements of 2 * (1/keep)^2 * mask, as the target is 0
        got = device.run("gradients", x=x, y=np.zeros((6, 50), np.float32), seed=seed)["g.scale"]
        mask = _random.bernoulli(torch.empty(6, 50), torch.tensor(seed), 0, 0.75).numpy()
        np.testing.assert_allclose(got[0], mask.sum(0) * 2 / 0.75**2 / 300, rtol=1e-5)


def test_masks_differ_between_layers(dropout_report):
    """Two dropouts of one network use different streams."""
    with _random.seeded(1) as mode:
        module = dropout_network().train()
        module(torch.randn(4, 6))
    assert mode.streams == 2
    assert dropout_report.parity.steps == 20


# Partial batches ----------------------------------------------------------------------------------------------


def test_partial_batches_are_exact_with_a_mask(export):
    """A fixed batch padded with rubbish gives the loss, gradients and evaluation of the real samples alone."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    fixed = Device(export(module, torch.randn(8, 6), batch=8).path)
    free = Device(export(module, torch.randn(8, 6), batch="dynamic").path)
    assert (fixed.manifest.batch.mode, fixed.manifest.batch.size, fixed.manifest.batch.mask) == ("fixed", 8, True)
    x, y = batch(5, 6)
    padded = {
        "x": np.concatenate([x, np.full((3, 6), 100.0, np.float32)]),
        "y": np.concatenate([y, [2, 2, 2]]),
        "mask": np.asarray([1, 1, 1, 1, 1, 0, 0, 0], np.float32),
    }
    for graph in ("gradients", "train", "evaluate"):
        wanted, got = free.run(graph, x=x, y=y), fixed.run(graph, **padded)
        assert wanted.keys() == got.keys()
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], atol=1e-6, err_msg=f"{graph} {name}")
    got = fixed.run("predict", **padded)["output"][:5]
    np.testing.assert_allclose(got, free.run("predict", x=x)["output"], atol=1e-6)
    empty = fixed.run("gradients", **{**padded, "mask": np.zeros(8, np.float32)})
    assert all(np.isfinite(value).all() and not value.any() for value in empty.values())


def test_fixed_batch_normalisation_refuses_a_mask(export):
    """Padding would change the statistics, so the manifest tells devices to drop the last partial batch."""
    report = export(convolutional(), torch.randn(8, 2, 8, 8), batch=4)
    manifest = Device(report.path).manifest
    assert (manifest.batch.size, manifest.batch.mask, manifest.batch_statistics) == (4, False, True)
    assert "mask" not in manifest.graphs["train"].inputs
    assert "mask" in manifest.graphs["evaluate"].inputs  # evaluation uses the running statistics
    assert any("drop" in note for note in report.notes)


def test_falls_back_to_a_fixed_batch_and_says_why(export):
    """A model that fixes its batch is exported at the example's size with the reason; 'dynamic' refuses it."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x.reshape(4, 6))

    report = export(Fixed(), torch.randn(4, 6))
    assert (report.batch.mode, report.batch.size, report.batch.mask) == ("fixed", 4, True)
    assert "batch" in report.fallback or "shape" in report.fallback
    assert report.parity.checked_batches == [1, 2, 4]
    with pytest.raises(ExportError, match="shape"):
        export(Fixed(), torch.randn(4, 6), batch="dynamic")


def test_batchnorm_of_single_values_needs_two_samples(export):
    """torch refuses to train BatchNorm1d on one sample without length; the manifest says so."""
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    report = export(module, torch.randn(6, 4))
    assert report.batch.minimum == 2
    assert report.parity.checked_batches == [2, 6, 7]
