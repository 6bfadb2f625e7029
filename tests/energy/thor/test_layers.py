"""Partition of a bundle's layer table into kinds and sizes."""

from __future__ import annotations

import pytest

from energy.errors import ProfileError
from energy.thor.layers import base_kind, canonical, partition


def entry(name, kind, given, made, **more):
    settings = more.pop("settings", {})
    return {"name": name, "kind": kind, "input_shape": given, "output_shape": made, "settings": settings, **more}


def manifest(*layers, parameters=(), batch=None):
    return {
        "name": "net",
        "layers": list(layers),
        "parameters": list(parameters),
        "optimizer": {"name": "sgd"},
        "batch": batch or {"mode": "dynamic", "size": None},
    }


def convolution(inputs, outputs, kernel, *, side=8, groups=1, stride=1, **more):
    settings = {"in_channels": inputs, "out_channels": outputs, "kernel_size": [kernel] * 2, "groups": groups}
    settings |= {"stride": [stride] * 2, "dilation": [1, 1], "bias": more.pop("bias", 0)}
    made = [outputs, side // stride, side // stride]
    return entry("c", "Conv2d", [inputs, side, side], made, settings=settings, **more)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (convolution(8, 16, 3), "conv2d"),
        (convolution(8, 16, 5), "conv2d"),
        (convolution(8, 16, 1), "conv2d-pointwise"),
        (convolution(8, 8, 3, groups=8), "conv2d-depthwise"),
        (convolution(8, 16, 3, groups=2), "conv2d-grouped"),
        (convolution(3, 16, 3, input_gradient=False), "conv2d-input"),
        (convolution(8, 16, 3, trainable=False), "conv2d-frozen"),
        (convolution(8, 16, 3, trainable=False, input_gradient=False), "conv2d-forward"),
        (entry("r", "ReLU", [4], [4]), "relu"),
        (entry("r", "relu", [4], [4]), "relu"),
        (entry("r", "ReLU", [4], [4], input_gradient=False), "relu-forward"),
        (entry("e", "Embedding", [5], [5, 8], settings={"num_embeddings": 9}, input_gradient=False), "embedding"),
        (entry("a", "add", [4], [4], settings={"operands": 2}), "add"),
        (entry("a", "add", [4], [4]), "add_scalar"),
        (entry("a", "add", [4], [4], settings={"operands": 2, "other_shape": [1, 4]}), "add_broadcast"),
    ],
)
def test_kinds_are_what_runs_the_same_code(layer, kind):
    """Kernels, groups, operands and what is computed backwards make the kind; modules and functions share it."""
    assert partition(manifest(layer))[0].kind == kind


def test_sizes_of_a_convolution():
    """Kernel and stride are sizes; those of 1 are left out."""
    (spec,) = partition(manifest(convolution(8, 16, 3, stride=2)), batch=4)
    assert spec.sizes == {
        "batch": 4,
        "in_channels": 8,
        "out_channels": 16,
        "in_positions": 64,
        "out_positions": 16,
        "kernel_positions": 9,
        "stride": 2,
    }


def test_depthwise_channels_are_computed_in_blocks():
    """What the exporter takes together is a size: 32 channels are 4 blocks, 31 are 31."""
    for channels, groups in ((32, 4), (12, 2), (31, 31)):
        (spec,) = partition(manifest(convolution(channels, channels, 3, groups=channels)))
        assert spec.sizes["groups"] == groups


def test_biases_and_parameters_are_layers_of_their_own():
    """A convolution's bias, and each size of tensor that the optimiser updates with how many there are."""
    parameters = [
        {"name": name, "shape": shape, "trainable": trainable}
        for name, shape, trainable in (("w", [4, 2], True), ("b", [8], True), ("m", [8], False))
    ]
    bias, optimizer = partition(manifest(convolution(8, 16, 3, bias=1), parameters=parameters))[1:]
    assert (bias.name, bias.kind, bias.sizes["in_channels"]) == ("c.bias", "bias", 16)
    assert (optimizer.kind, optimizer.sizes, optimizer.calls) == ("optimizer-sgd", {"elements": 8}, 2)


def test_what_costs_nothing_is_left_out():
    """Flatten, identity, a dropout of 0 and modules that only hold parameters."""
    free = [
        entry("f", "Flatten", [2, 2], [4]),
        entry("i", "Identity", [4], [4]),
        entry("d", "Dropout", [4], [4], settings={"p": 0}),
        entry("h", "Holder", [4], [4], calls=0),
    ]
    assert partition(manifest(*free)) == []
    assert partition(manifest(entry("d", "Dropout", [4], [4], settings={"p": "0.5"})))[0].kind == "dropout"


def test_stacked_recurrent_layers_are_one_each():
    """Two layers in both directions: the second takes the states of both, and needs its input's gradient."""
    settings = {"hidden_size": 8, "num_layers": 2, "bidirectional": 1}
    lower, upper = partition(manifest(entry("l", "LSTM", [10, 5], [10, 16], settings=settings, input_gradient=False)))
    assert (lower.kind, lower.sizes["in_channels"], lower.calls) == ("lstm-input", 5, 2)
    assert (upper.kind, upper.sizes["in_channels"], upper.calls) == ("lstm", 16, 2)
    assert upper.sizes["in_positions"] == 10


def test_a_fixed_batch_wins():
    """A bundle that takes one batch size has it, whatever is asked for; else it is 32 by default."""
    layer = entry("r", "ReLU", [4], [4])
    assert partition(manifest(layer, batch={"mode": "fixed", "size": 5}), batch=9)[0].sizes["batch"] == 5
    assert partition(manifest(layer))[0].sizes["batch"] == 32


def test_an_older_bundle_says_what_to_do():
    """Without settings, or without layers, the message names the bundle and the cure."""
    old = {"name": "0", "kind": "Linear", "input_shape": [4], "output_shape": [2]}
    for broken in (manifest(old), manifest()):
        with pytest.raises(ProfileError, match=r"bundle net: .*export it again with edge-export bundle"):
            partition(broken)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Conv2d", "conv2d"),
        ("BatchNorm1d", "batch_norm1d"),
        ("AdaptiveAvgPool2d", "adaptive_avg_pool2d"),
        ("ReLU6", "relu6"),
        ("MultiheadAttention", "multihead_attention"),
        ("max_pool2d", "max_pool2d"),
        ("LayerNorm", "layer_norm"),
    ],
)
def test_classes_and_functions_have_one_name(name, kind):
    """torch's classes become the names of its functions."""
    assert canonical(name) == kind


def test_base_kind_forgets_the_backward_part():
    """The families that only differ in what they compute backwards."""
    assert base_kind("conv2d-depthwise-input") == "conv2d-depthwise"
    assert base_kind("optimizer-sgd") == "optimizer-sgd"
