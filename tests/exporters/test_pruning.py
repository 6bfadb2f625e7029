"""Pruning: what goes, what stays, and that the rest still trains and exports."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_pruning")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from edge_runtime.bundle import Bundle  # noqa: E402
from examples import model_zoo  # noqa: E402
from exporters import export_bundle  # noqa: E402
from exporters._tuning import Samples, Tuning, fine_tune, score  # noqa: E402
from exporters.errors import ExportError  # noqa: E402
from exporters.pruning import prune_channels  # noqa: E402


def weights(module):
    """A cost that needs no profile: multiplications per output position, roughly."""
    return float(sum(value.numel() for value in module.parameters() if value.dim() > 1))


def prune(module, example, target, cost=weights, **options):
    labels = torch.arange(len(example)) % 3
    return prune_channels(
        module,
        example,
        cost=cost,
        target=target,
        loss=functional.cross_entropy,
        batches=lambda: [(example, labels)],
        **options,
    )


@pytest.mark.parametrize("build", [model_zoo.lenet, model_zoo.resnet8, model_zoo.mobile, model_zoo.har])
def test_networks_get_as_cheap_as_asked(build):
    """Chains, residual sums, depthwise and 1-D convolutions reach the target and still answer for every class."""
    given = build()
    module, example = given["module"], given["example_input"][:4]
    before = copy.deepcopy(module.state_dict())
    pruned = prune(module, example, 0.6 * weights(module))
    assert pruned.cost_after <= 0.6 * pruned.cost_before
    assert pruned.cost_after == weights(pruned.module)
    assert pruned.module(example).shape == module.eval()(example).shape
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [step.cost for step in pruned.removals] == sorted((step.cost for step in pruned.removals), reverse=True)


def test_only_what_saves_is_removed():
    """Where one layer alone costs anything, the other layers keep their channels."""
    given = model_zoo.har()
    module, example = given["module"], given["example_input"][:4]
    pruned = prune(module, example, 48.0, cost=lambda part: float(part[4].out_channels))
    assert pruned.module[4].out_channels == 48
    assert pruned.module[0].out_channels == 32
    assert pruned.module[7].out_channels == 64


def test_channels_that_do_nothing_go_first():
    """Channels without any influence on the loss are removed before those with some, and nothing else changes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    idle = [1, 4, 6, 7, 9, 12, 13, 15]
    with torch.no_grad():
        module[2].weight[:, idle] = 0
    example = torch.randn(8, 6)
    pruned = prune(module, example, 0.5 * weights(module))
    assert pruned.module[0].out_features == 8
    assert torch.allclose(pruned.module(example), module(example), atol=1e-6)


def test_layers_that_are_to_be_kept_keep_their_channels():
    """``keep`` names layers by prefix."""
    given = model_zoo.har()
    module, example = given["module"], given["example_input"][:4]
    pruned = prune(module, example, 0.7 * weights(module), keep=["0", "4"])
    assert pruned.module[0].out_channels == 32
    assert pruned.module[4].out_channels == 64
    assert pruned.module[7].out_channels < 64


def test_a_target_out_of_reach_is_refused():
    """A network is not thinned to nothing; the message says how far it went."""
    given = model_zoo.mlp()
    with pytest.raises(ExportError, match="pruning stops at"):
        prune(given["module"], given["example_input"][:4], 1.0)


def test_a_thinner_network_trains_and_exports(tmp_path):
    """After training towards its teacher it answers as well as before, and its bundle passes the parity check."""
    torch.manual_seed(0)
    x = torch.randn(240, 9, 32)
    y = x[:, :3].mean(2).argmax(1)
    samples = Samples(x, y)
    module = nn.Sequential(
        nn.Conv1d(9, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    fine_tune(module, samples, "cross_entropy", Tuning(epochs=8, learning_rate=0.1, batch_size=16))
    _, before = score(module, samples, "cross_entropy")
    pruned = prune(module, x[:4], 0.5 * weights(module)).module
    fine_tune(pruned, samples, "cross_entropy", Tuning(epochs=4, batch_size=16), teacher=module)
    _, after = score(pruned, samples, "cross_entropy")
    assert before > 0.8
    assert after > before - 0.05
    report = export_bundle(pruned, x[:4], tmp_path / "thin.bundle", name="thin")
    assert report.parameters < sum(value.numel() for value in module.parameters())
    assert Bundle.open(tmp_path / "thin.bundle").layout().size > 0
