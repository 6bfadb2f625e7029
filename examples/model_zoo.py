"""Eight small models that the exporter is proven on, as build functions for the command line.

``edge-export bundle examples.model_zoo:lenet -o lenet.bundle``. Each function returns the keyword arguments of
`exporters.export_bundle`: the module (weights from a fixed seed), an example batch, a name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

BATCH = 32


class DepthwiseBlock(nn.Module):
    """Depthwise then pointwise convolution, each with BatchNorm and ReLU6."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, channels, h, w]`` to ``[batch, outputs, h / stride, w / stride]``."""
        x = functional.relu6(self.norm1(self.depthwise(x)))
        return functional.relu6(self.norm2(self.pointwise(x)))


class ResidualBlock(nn.Module):
    """Basic block of a residual network (He et al. 2016), with a projection where the shape changes."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != outputs:
            projection = nn.Conv2d(channels, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, channels, h, w]`` to ``[batch, outputs, h / stride, w / stride]``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class TransformerClassifier(nn.Module):
    """Two encoder layers over 16 tokens of a vocabulary of 200, mean-pooled, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 64)
        self.position = nn.Parameter(torch.randn(1, 16, 64) * 0.02)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token numbers ``[batch, 16]`` int64 to logits ``[batch, 4]``."""
        logits: torch.Tensor = self.head(self.encoder(self.embedding(x) + self.position).mean(1))
        return logits


class RecurrentClassifier(nn.Module):
    """One recurrent layer over 32 time steps of 9 channels; the last state is classified into 6."""

    def __init__(self, cell: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.recurrent = cell(9, 32, batch_first=True)
        self.head = nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, 32, 9]`` to logits ``[batch, 6]``."""
        states, _ = self.recurrent(x)
        logits: torch.Tensor = self.head(states[:, -1])
        return logits


def mlp() -> dict[str, Any]:
    """Three dense layers on 64 inputs, 10 classes."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return _arguments("mlp", nn.Sequential(*layers), torch.randn(BATCH, 64))


def lenet() -> dict[str, Any]:
    """LeNet-like network with BatchNorm and max-pooling on 28x28 images, 10 classes."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 10),
    )
    return _arguments("lenet", module, torch.randn(BATCH, 1, 28, 28))


def resnet8() -> dict[str, Any]:
    """Residual network with three blocks on 32x32 colour images, 10 classes."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return _arguments("resnet8", module, torch.randn(BATCH, 3, 32, 32))


def mobile() -> dict[str, Any]:
    """Depthwise-separable network in the manner of MobileNet on 32x32 colour images, 10 classes."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        DepthwiseBlock(16, 32, 1),
        DepthwiseBlock(32, 64, 2),
        DepthwiseBlock(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return _arguments("mobile", module, torch.randn(BATCH, 3, 32, 32))


def har() -> dict[str, Any]:
    """1-D convolutional network on windows of 128 samples from 9 inertial channels, 6 activities."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(9, 32, 5, padding=2),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 6),
    )
    return _arguments("har", module, torch.randn(BATCH, 9, 128))


def transformer() -> dict[str, Any]:
    """Small transformer encoder on token sequences, 4 classes."""
    torch.manual_seed(0)
    return _arguments("transformer", TransformerClassifier(), torch.randint(0, 200, (BATCH, 16)))


def lstm() -> dict[str, Any]:
    """LSTM on 32 time steps of 9 channels, 6 classes."""
    torch.manual_seed(0)
    return _arguments("lstm", RecurrentClassifier(nn.LSTM), torch.randn(BATCH, 32, 9))


def gru() -> dict[str, Any]:
    """GRU on 32 time steps of 9 channels, 6 classes."""
    torch.manual_seed(0)
    return _arguments("gru", RecurrentClassifier(nn.GRU), torch.randn(BATCH, 32, 9))


MODELS = {build.__name__: build for build in (mlp, lenet, resnet8, mobile, har, transformer, lstm, gru)}


def _arguments(name: str, module: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    return {"module": module, "example_input": example, "name": name}
