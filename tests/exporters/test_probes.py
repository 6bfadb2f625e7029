"""Probe packs, and the layer table they are made from: what of a step is in them, and that it computes the layer."""

from __future__ import annotations

import hashlib
import json

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from energy.thor.layers import elementary, partition, spec_of
from energy.thor.pack import Pack
from examples.model_zoo import DepthwiseBlock, RecurrentClassifier, ResidualBlock, TransformerClassifier
from exporters import cli
from exporters._layers import layer_table
from exporters._model import inspect_model
from exporters._probe_graphs import layer_graph, optimizer_graph
from exporters.errors import UsageError
from exporters.probes import export_probes


def table(module, example, **options):
    """The layer table as plain dicts, by name."""
    torch.manual_seed(0)
    model = inspect_model(module, example, options.get("loss", "cross_entropy"), options.get("trainable"))
    return {layer.name: msgspec.to_builtins(layer) for layer in layer_table(model)}


# The layer table ----------------------------------------------------------------------------------------------


def test_functions_outside_of_layers_are_listed():
    """A residual block calls relu and add itself; names are unique, what layers call is theirs."""
    module = nn.Sequential(ResidualBlock(4, 4, 1), nn.Flatten(), nn.Linear(256, 3))
    layers = table(module, torch.randn(2, 4, 8, 8))
    assert list(layers) == [
        *("0.conv1", "0.norm1", "0.relu", "0.conv2", "0.norm2", "0.shortcut", "0.add", "0.relu_2", "1", "2", "loss")
    ]
    assert layers["0.add"]["settings"] == {"operands": 2}
    assert layers["0.relu"]["output_shape"] == (4, 8, 8)
    assert layers["loss"]["kind"] == "cross_entropy"


def test_the_first_trained_layer_needs_no_input_gradient():
    """Below it nothing is computed backwards, above it everything; frozen layers pass gradients on."""
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
    found = table(nn.Sequential(*layers), torch.randn(2, 4), trainable=["2.", "6."])
    specs = {name: spec_of(entry, 1).kind for name, entry in found.items() if name != "loss"}
    assert specs == {
        "0": "linear-forward",
        "1": "relu-forward",
        "2": "linear-input",
        "3": "relu",
        "4": "linear-frozen",
        "5": "relu",
        "6": "linear",
    }


class Repeated(nn.Module):
    """One ReLU and one dense layer, each used more than once."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        """``[batch, 4]`` to ``[batch, 2]``."""
        x = self.relu(self.dense(self.relu(self.dense(x))))
        return self.head(self.relu(x[:, :2]))


def test_a_layer_that_runs_again():
    """With the same shapes it is called twice; with others it gets an entry, whose parameters do not count again."""
    found = table(Repeated(), torch.randn(2, 4))
    # The first run of the dense layer needs no gradient of its input, so it is another kind than the second.
    assert [(name, found[name]["calls"]) for name in ("relu", "relu_2", "dense", "dense_2")] == [
        ("relu", 2),
        ("relu_2", 1),
        ("dense", 1),
        ("dense_2", 1),
    ]
    assert found["dense_2"]["parameter_bytes"] == 0
    assert found["getitem"]["output_shape"] == (2,)


class Scale(nn.Module):
    """A layer of the user's own, with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        """Scaled."""
        return functional.relu(x * self.scale)


def test_own_layers_are_what_they_call():
    """Their entry keeps the parameters and runs nothing; the functions that they call stand beside it."""
    found = table(nn.Sequential(Scale(), nn.Linear(4, 3)), torch.randn(2, 4))
    assert (found["0"]["calls"], found["0"]["parameter_bytes"]) == (0, 16)
    assert found["0.mul"]["settings"]["other_shape"] == [4]
    assert found["0.relu"]["calls"] == 1


def test_an_active_dropout_is_listed_and_buffers_stay():
    """The table is made in training mode, on copies."""
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    before = module[0].running_mean.clone()
    assert table(module, torch.randn(8, 4))["1"]["settings"] == {"p": "0.5"}
    assert torch.equal(module[0].running_mean, before)


def test_partition_of_a_transformer():
    """Attention is one layer, the position added to tokens has its own kind, and every name is there once."""
    layers = list(table(TransformerClassifier(), torch.randint(0, 200, (4, 16))).values())
    specs = partition({"layers": layers, "optimizer": {"name": "sgd"}}, 4)
    kinds = [spec.kind for spec in specs]
    assert kinds.count("multihead_attention") == 2
    assert "add_broadcast" in kinds
    assert len({spec.name for spec in specs}) == len(specs)


# Graphs of single layers --------------------------------------------------------------------------------------


def run(graph, feed):
    session = onnxruntime.InferenceSession(graph.builder.to_bytes("probe"), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


LAYERS = {
    "conv2d": (nn.Conv2d(3, 4, 3, 2, 1), (3, 9, 9)),
    "conv2d-pointwise": (nn.Conv2d(3, 5, 1), (3, 4, 4)),
    "conv2d-depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 6)),
    "conv1d": (nn.Conv1d(3, 4, 5, padding=2, bias=False), (3, 12)),
    "linear": (nn.Linear(6, 5), (6,)),
    "batch_norm2d": (nn.BatchNorm2d(3), (3, 4, 4)),
    "layer_norm": (nn.LayerNorm(6), (3, 6)),
    "relu6": (nn.ReLU6(), (7,)),
    "gelu": (nn.GELU(), (7,)),
    "max_pool2d": (nn.MaxPool2d(2), (3, 6, 6)),
    "avg_pool2d": (nn.AvgPool2d(2), (3, 6, 6)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d(1), (3, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_probe_computes_its_layer(kind):
    """Output, input gradient and weight gradients of a probe are torch's, for a batch it was not traced with."""
    module, shape = LAYERS[kind]
    torch.manual_seed(1)
    entries = table(nn.Sequential(nn.Linear(shape[-1], shape[-1]), module, nn.Flatten()), torch.randn(2, *shape))
    entry = elementary(entries["1"])[0]
    assert spec_of(entry, 1).kind == kind
    graph = layer_graph(entry, 2)
    x = torch.randn(5, *shape, requires_grad=True)
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        if kind.startswith("conv") and bias is not None:
            bias.zero_()  # a layer of its own
    y = module.train()(x)
    gy = torch.randn_like(y)
    parameters = dict(module.named_parameters())
    wanted = {f"g.{name}": value for name, value in parameters.items() if f"g.{name}" in graph.builder.outputs}
    expected = torch.autograd.grad(y, [x, *wanted.values()], gy)
    feed = {"x": x.detach().numpy(), "gy": gy.numpy()}
    feed |= {f"p.{name}": value.detach().numpy() for name, value in module.state_dict().items()}
    feed = {name: value for name, value in feed.items() if name in graph.builder.inputs}
    if kind == "batch_norm2d":
        feed |= {"p.running_mean": np.zeros(3, np.float32), "p.running_var": np.ones(3, np.float32)}
    feed = {name: value for name, value in feed.items() if value.dtype == np.float32}
    found = run(graph, feed)
    np.testing.assert_allclose(found["out"], y.detach().numpy(), atol=1e-4)
    for name, value in zip(["gx", *wanted], expected, strict=True):
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-4, err_msg=name)
    assert len(wanted) == len(parameters) - (kind.startswith("conv") and "bias" in parameters)


def test_blocks_of_depthwise_channels_are_those_of_the_exporter():
    """The number that a layer's sizes go by is the one that its gradient is computed with."""
    from energy.thor.layers import DEPTHWISE_BLOCK
    from exporters._decompositions import _BLOCK

    assert DEPTHWISE_BLOCK == _BLOCK


def test_a_first_layer_has_no_input_gradient():
    """Its probe computes weight gradients only; a frozen one the input gradient only, a forward one neither."""
    entry = table(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))["0"]
    outputs = {
        (input_gradient, trainable): set(
            layer_graph({**entry, "input_gradient": input_gradient, "trainable": trainable}, 2).builder.outputs
        )
        for input_gradient in (False, True)
        for trainable in (False, True)
    }
    weights = {"g.weight", "g.bias"}
    assert outputs == {
        (True, True): {"out", "gx", *weights},
        (False, True): {"out", *weights},
        (True, False): {"out", "gx"},
        (False, False): {"out"},
    }


def test_the_loss_and_the_optimiser_are_probed():
    """The gradient of the logits, and several tensors of one size updated as in train.onnx."""
    entry = table(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))["loss"]
    loss = layer_graph(entry, 2)
    x = torch.randn(6, 3, requires_grad=True)
    y = torch.randint(0, 3, (6,))
    expected = functional.cross_entropy(x, y)
    expected.backward()
    found = run(loss, {"x": x.detach().numpy(), "y": y.numpy()})
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-5)
    np.testing.assert_allclose(found["gx"], x.grad.numpy(), atol=1e-6)
    assert loss.limits == {"y": 3}
    assert optimizer_graph("adam", 10).runs == 8
    assert {"s.exp_avg.w0", "lr"} <= set(optimizer_graph("adam", 10).builder.inputs)


# Packs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    from exporters import export_bundle

    folder = tmp_path_factory.mktemp("bundles")
    mixed = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), DepthwiseBlock(8, 8, 1), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(128, 4)),
    )
    recurrent = RecurrentClassifier(nn.GRU)
    for name, module, example, optimizer in (
        ("mixed", mixed, torch.randn(4, 3, 16, 16), "sgd"),
        ("recurrent", recurrent, torch.randn(4, 2, 9), "adam"),
        ("dense", nn.Linear(4, 3), torch.randn(4, 4), "sgd"),
    ):
        export_bundle(module, example, folder / f"{name}.bundle", name=name, optimizer=optimizer, parity=False)
    return [folder / f"{name}.bundle" for name in ("mixed", "recurrent", "dense")]


@pytest.fixture(scope="module")
def packed(bundles, tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "layers.probes"
    return export_probes(bundles[:2], path, per_kind=2, batch=4), path


def test_a_pack_holds_every_layer_and_other_sizes(packed):
    """All layers of both models have a probe, and no other size is one of them."""
    report, path = packed
    assert report.missing == {}
    pack = Pack(path)
    keys = {role: [] for role in ("layer", "candidate", "empty")}
    for probe in pack.table.probes:
        keys[probe.role].append((probe.kind, tuple(sorted(probe.sizes.items()))))
    asked = {(layer.kind, tuple(sorted(layer.sizes.items()))) for model in pack.table.models for layer in model.layers}
    assert set(keys["layer"]) == asked
    assert asked.isdisjoint(keys["candidate"])
    assert len(set(keys["candidate"])) == len(keys["candidate"])
    assert len(keys["empty"]) == 1
    kinds = {"conv2d-input", "conv2d-depthwise", "bias", "relu6", "dropout", "gru-input", "optimizer-adam"}
    assert kinds <= set(report.layers)
    assert all(report.candidates[kind] >= 1 for kind in report.candidates)
    pack.close()


def test_every_probe_runs_on_a_device(packed):
    """onnxruntime takes each graph with another batch than it was made for."""
    from energy.thor.probing import Stepper

    _, path = packed
    pack = Pack(path)
    for probe in pack.table.probes:
        Stepper(pack.graph(probe), batch=probe.batch or 3, limits=probe.limits, footprint=0).run(1)
    pack.close()


def test_packs_have_the_same_bytes(bundles, tmp_path):
    """Nothing depends on time or chance but the seed."""
    hashes = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        path = tmp_path / name
        export_probes(bundles[2:], path, per_kind=1, seed=seed, batch=4)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1] != hashes[2]


class Folded(nn.Module):
    """Uses a function that no probe knows."""

    def forward(self, x):
        """Sorted rows."""
        return x.flip(1)


def test_layers_without_a_probe_are_named(tmp_path, capsys):
    """The pack is made all the same, and says what will be missing."""
    from exporters import export_bundle

    module = nn.Sequential(Folded(), nn.Linear(4, 3))
    export_bundle(module, torch.randn(4, 4), tmp_path / "m.bundle", name="m", parity=False)
    arguments = ["probes", str(tmp_path / "m.bundle"), "-o", str(tmp_path / "p"), "--per-kind", "1"]
    assert cli.main(arguments) == 0
    assert "no probe for flip-forward (m: 0.flip): what it costs will be missing" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == {"flip-forward": ["m: 0.flip"]}


def test_wrong_input_is_refused(tmp_path, capsys):
    """No bundle, a missing one, a negative number: one line and exit code 2."""
    with pytest.raises(UsageError, match="at least one bundle"):
        export_probes([], tmp_path / "p")
    assert cli.main(["probes", str(tmp_path / "none.bundle"), "-o", str(tmp_path / "p")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["probes", "x", "-o", str(tmp_path / "p"), "--per-kind", "-1"]) == 2
    assert "--per-kind is -1" in capsys.readouterr().err
