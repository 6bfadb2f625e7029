"""The eight model families: dynamic batch, parity with torch, standard operators, what training does to them."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from examples.model_zoo import MODELS
from exporters import export_bundle
from tests.exporters.runner import Device

SAMPLES = 8
STATISTICS = {"lenet", "resnet8", "mobile", "har"}


def shortened(name):
    """The arguments of a zoo model; recurrent ones over 8 time steps instead of 32, which unrolls to a quarter."""
    arguments = MODELS[name]()
    arguments["example_input"] = arguments["example_input"][:SAMPLES]
    if name in {"lstm", "gru"}:
        arguments["example_input"] = arguments["example_input"][:, :8]
    return arguments


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request, tmp_path_factory):
    arguments = shortened(request.param)
    path = tmp_path_factory.mktemp("zoo") / f"{request.param}.bundle"
    return arguments, export_bundle(path=path, **arguments)


def test_takes_any_batch_and_equals_torch(exported):
    """Every family traces with a dynamic batch and passes the gate at every size, far below its limit."""
    arguments, report = exported
    assert report.batch.mode == "dynamic"
    assert report.fallback is None
    assert report.parity.steps == 20
    assert report.parity.checked_batches == [1, 2, 7, 8]
    assert 0 < report.parity.parameters < 1e-6
    assert report.parity.gradients < 1e-5
    assert (report.parity.buffers > 0) == (arguments["name"] in STATISTICS)
    assert report.parity.fused <= 1e-6


def test_graphs_hold_only_standard_operators(exported):
    """Default domain, opset 20, IR 9, no external data, no functions; the ONNX checker agrees."""
    _, report = exported
    device = Device(report.path)
    for name, graph in device.manifest.graphs.items():
        model = onnx.load_from_string(device.bundle.graph(name))
        onnx.checker.check_model(model, full_check=True)
        assert [(item.domain, item.version) for item in model.opset_import] == [("", 20)]
        assert model.ir_version == 9
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        assert graph.inputs == [item.name for item in model.graph.input]
        assert graph.outputs == [item.name for item in model.graph.output]


def test_trains_from_the_file_as_torch_does(exported):
    """Three consecutive steps from the bundle's file, without restarting from torch, end where torch ends."""
    arguments, report = exported
    device = Device(report.path)
    module = copy.deepcopy(arguments["module"]).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    x = arguments["example_input"][:5]
    y = torch.randint(0, device.manifest.task.classes, (5,), generator=generator)
    for _ in range(3):
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        assert device.train(x=x.numpy(), y=y.numpy()) == pytest.approx(loss.item(), abs=1e-4)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            np.testing.assert_allclose(device.state[f"p.{name}"], value.numpy(), atol=1e-4)


def test_manifest_describes_the_model(exported):
    """Parameter table, slots and layer table agree with the torch module."""
    arguments, report = exported
    manifest = Device(report.path).manifest
    module = arguments["module"]
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert {entry.name: entry.shape for entry in manifest.parameters} == expected
    trained = [entry.name for entry in manifest.parameters if entry.trainable]
    assert trained == [name for name, _ in module.named_parameters()]
    assert [slot.name for slot in manifest.optimizer.slots] == [f"momentum.{name}" for name in trained]
    layers = {layer.name: layer for layer in manifest.layers}
    assert {entry.layer for entry in manifest.parameters} <= set(layers)
    assert sum(layer.parameter_bytes for layer in manifest.layers) == sum(
        value.numel() * value.element_size() for value in module.state_dict().values()
    )
    assert manifest.batch_statistics == (arguments["name"] in STATISTICS)


def test_layer_table_counts_flops():
    """Known layers of LeNet: 2 per multiply-add, and one for each added bias."""
    from exporters._layers import layer_table
    from exporters._model import inspect_model

    arguments = shortened("lenet")
    model = inspect_model(arguments["module"], arguments["example_input"], "cross_entropy", None)
    layers = {layer.name: layer for layer in layer_table(model)}
    assert layers["0"].flops == 16 * 28 * 28 * (2 * 25 + 1)
    assert layers["0"].output_shape == (16, 28, 28)
    assert layers["11"].flops == 10 * (2 * 120 + 1)
    assert layers["3"].activation_bytes == 4 * 16 * 14 * 14
