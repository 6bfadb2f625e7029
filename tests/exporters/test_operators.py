"""Layers beyond the eight families: each is exported, which passes the parity gate, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from exporters import ExportError
from exporters._decompositions import weight_gradient


class Call(nn.Module):
    """A dense layer around a function."""

    def __init__(self, function, outputs=8):
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(outputs, 3)
        self.function = function

    def forward(self, x):
        return self.after(self.function(self.before(x)))


def _in_place(x):
    x[:, 2:4] += 1.5
    x[:, 0] = x[:, 1] * 2
    return torch.relu_(x)


def _head(size, classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))


FUNCTIONS = {
    "activations": lambda x: (
        functional.silu(x) + functional.elu(x) + functional.softplus(x) + functional.hardswish(x) + functional.mish(x)
    ),
    "gelu": lambda x: functional.gelu(x) + functional.gelu(x, approximate="tanh"),
    "logarithms": lambda x: torch.log1p(x * x) + torch.expm1(-x * x) + functional.logsigmoid(x),
    "in_place": _in_place,
    "indexing": lambda x: x[:, [1, 0, 3, 2, 7, 6, 5, 4]] + x.flip(1) + torch.roll(x, 2, 1),
    "reductions": lambda x: x - x.amax(1, keepdim=True) + x.var(1, keepdim=True) + x.cumsum(1),
    "splits": lambda x: torch.cat([part * index for index, part in enumerate(x.split(2, 1))], 1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x) + x.clamp(-0.5, 0.5),
    "normalised": lambda x: functional.layer_norm(x, (8,)) + functional.normalize(x, dim=1),
    "outer": lambda x: torch.einsum("bi,bj->bij", x, x).sum(2),
}

IMAGES = {
    "transposed": lambda: [nn.Conv2d(4, 6, 3, 2), nn.ConvTranspose2d(6, 4, 3, 2, output_padding=1), _head(4 * 64)],
    "transposed_groups": lambda: [nn.ConvTranspose2d(4, 6, 3, 2, padding=1, groups=2), _head(6 * 225)],
    "dilated": lambda: [nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), nn.GroupNorm(2, 6), _head(6 * 64)],
    "strided": lambda: [nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 0)), _head(6 * 12)],
    "depthwise": lambda: [nn.Conv2d(4, 8, 3, 1, 1, groups=4), nn.BatchNorm2d(8), _head(8 * 64)],
    "overlapping_pool": lambda: [nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1), _head(4 * 16)],
    "ceil_pool": lambda: [nn.Conv2d(4, 4, 4), nn.MaxPool2d(3, 2, ceil_mode=True), _head(4 * 4)],
    "dilated_pool": lambda: [nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1, dilation=2), _head(4 * 9)],
    "average_pool": lambda: [nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 2, 1), _head(4 * 16)],
    "adaptive_pool": lambda: [nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d((3, 5)), _head(4 * 15)],
    "plain_batchnorm": lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), _head(4 * 36)],
    "untracked_batchnorm": lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), _head(4 * 36)],
    "instance_norm": lambda: [nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.PReLU(), _head(4 * 36)],
    "upsampled": lambda: [nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2), _head(2 * 144)],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(export, name):
    """Element-wise, indexing and reducing functions pass the gate with a dynamic batch."""
    torch.manual_seed(2)
    report = export(Call(FUNCTIONS[name]), torch.randn(4, 6), batch="dynamic")
    assert report.parity.steps == 20


@pytest.mark.parametrize("name", IMAGES)
def test_image_layers(export, name):
    """Convolutions, pools and normalisations of every form pass the gate with a dynamic batch."""
    torch.manual_seed(2)
    report = export(nn.Sequential(*IMAGES[name]()), torch.randn(4, 4, 8, 8), batch="dynamic")
    assert report.parity.steps == 20


def test_one_batchnorm_used_twice(export):
    """Every call of a layer gets its own tensors to write over, also when the layer is shared."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), _head(4 * 36)

        def forward(self, x):
            y = self.norm(self.first(x))
            return self.head(self.norm(y * y))

    assert export(Twice(), torch.randn(4, 2, 8, 8)).parity.buffers < 1e-6


def test_three_dimensions(export):
    """Volumes: convolution, BatchNorm and max-pooling."""
    layers = [nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.MaxPool3d(2), _head(4 * 8)]
    assert export(nn.Sequential(*layers), torch.randn(3, 2, 6, 6, 6)).batch.mode == "dynamic"


def test_attention_with_dropout_mask_and_padding(export):
    """A causal encoder with dropout and a padded vocabulary."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16, padding_idx=0)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            mask = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
            return self.head(self.layer(self.embedding(x), src_mask=mask)[:, -1])

    report = export(Encoder(), torch.randint(0, 20, (4, 6)), optimizer="adamw")
    assert report.batch.mode == "dynamic"
    assert report.parity.gradients < 1e-5


def test_recurrent_dropout_needs_a_fixed_batch(export):
    """torch leaves this dropout out of a symbolic trace; the export says so and stays right."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    report = export(Recurrent(), torch.randn(3, 3, 3))
    assert "dropout between recurrent layers" in report.fallback
    assert report.batch.mask
    assert report.parity.gradients < 1e-5


REFUSED = {
    "random": (Call(lambda x: x + torch.randn_like(x)), r"draws random numbers by aten\.randn_like.*dropout"),
    "fourier": (Call(lambda x: torch.fft.rfft(x).abs(), 5), r"aten\._fft_r2c.*no ONNX translation"),
    "data": (Call(lambda x: x if x.sum() > 0 else -x), "must not depend on the values"),
    "cumulative": (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=None)), "'1'.*momentum=None.*set a"),
    "double": (nn.Linear(6, 3).double(), r"module\(example_input\) failed|call module.float"),
    "half": (nn.Linear(6, 3).half(), "call module.float"),
    "infinite": (nn.Linear(6, 3), "NaN or infinite"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_name_the_cause(export, name):
    """What cannot be exported is refused with the operator or layer and a cure."""
    module, message = REFUSED[name]
    if name == "infinite":
        with torch.no_grad():
            module.bias[0] = float("-inf")
    with pytest.raises(ExportError, match=message):
        export(module, torch.randn(4, 6))


def test_refuses_average_pool_with_ceil(export):
    """The message holds the layer's own numbers."""
    module = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(3, 2, ceil_mode=True), _head(2 * 16))
    with pytest.raises(ExportError, match=r"ceil_mode.*kernel \[3, 3\], stride \[2, 2\]"):
        export(module, torch.randn(4, 2, 8, 8))


def test_refuses_a_tuple_output(export):
    """Recurrent layers return their state as well; the message says what to return."""
    with pytest.raises(ExportError, match="forward\\(\\) returns tuple; return one tensor"):
        export(nn.LSTM(6, 3, batch_first=True), torch.randn(4, 5, 6))


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "padding", "dilation"),
    [
        (6, 8, 1, 3, 1, 1, 1),
        (6, 8, 1, 3, 2, 1, 1),
        (6, 8, 1, 1, 2, 0, 1),
        (6, 8, 1, 1, 1, 0, 1),
        (16, 16, 16, 3, 1, 1, 1),
        (12, 24, 12, 3, 2, 1, 1),
        (8, 12, 4, 5, 2, 0, 1),
        (4, 6, 2, 3, 1, 2, 2),
    ],
)
def test_weight_gradient_in_double(channels, outputs, groups, kernel, stride, padding, dilation):  # noqa: PLR0917
    """The fast weight gradient is exact, in 1 and 2 dimensions, for dense, grouped and depthwise convolutions."""
    torch.manual_seed(0)
    for rank, convolve in ((1, torch.conv1d), (2, torch.conv2d)):
        x = torch.randn(3, channels, *[13, 10][:rank], dtype=torch.float64)
        weight = torch.randn(outputs, channels // groups, *[kernel] * rank, dtype=torch.float64, requires_grad=True)
        y = convolve(x, weight, None, stride, padding, dilation, groups)
        gradient = torch.randn_like(y)
        (wanted,) = torch.autograd.grad(y, weight, gradient)
        axes = [[value] * rank for value in (stride, padding, dilation)]
        got = weight_gradient(gradient, x, weight.detach(), *axes, groups)
        assert torch.allclose(got, wanted, atol=1e-10)
