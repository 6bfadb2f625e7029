"""Small networks of six architectures with random widths, for what must hold for models never seen before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from examples.model_zoo import BATCH, DepthwiseBlock, ResidualBlock

if TYPE_CHECKING:
    import random

    import torch

_NARROWEST, _WIDEST = 0.5, 1.7


class Recurrent(nn.Module):
    """One LSTM over 9 channels; the last state is classified into 6."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(9, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, steps, 9]`` to logits ``[batch, 6]``."""
        states, _ = self.recurrent(x)
        logits: torch.Tensor = self.head(states[:, -1])
        return logits


def build(architecture: str, name: str, rng: random.Random) -> dict[str, Any]:
    """Keyword arguments of `exporters.export_bundle` for a net of an architecture of `examples.model_zoo`."""
    import torch

    torch.manual_seed(rng.randrange(1 << 30))
    module, shape = _BUILDERS[architecture](
        lambda size: round(size * _NARROWEST * (_WIDEST / _NARROWEST) ** rng.random())
    )
    return {"module": module, "example_input": torch.randn(BATCH, *shape), "name": name}


def _mlp(size: Any) -> tuple[nn.Module, tuple[int, ...]]:
    one, two = size(128), size(64)
    return nn.Sequential(nn.Linear(64, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, 10)), (64,)


def _lenet(size: Any) -> tuple[nn.Module, tuple[int, ...]]:
    one, two, dense = size(16), size(32), size(120)
    layers = [nn.Conv2d(1, one, 5, padding=2), nn.BatchNorm2d(one), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(one, two, 5), nn.BatchNorm2d(two), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(two * 25, dense), nn.ReLU(), nn.Linear(dense, 10)), (1, 28, 28)


def _resnet8(size: Any) -> tuple[nn.Module, tuple[int, ...]]:
    one, two, three = size(16), size(32), size(64)
    layers = [nn.Conv2d(3, one, 3, 1, 1, bias=False), nn.BatchNorm2d(one), nn.ReLU(), ResidualBlock(one, one, 1)]
    layers += [ResidualBlock(one, two, 2), ResidualBlock(two, three, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(three, 10)), (3, 32, 32)


def _mobile(size: Any) -> tuple[nn.Module, tuple[int, ...]]:
    one, two, three = size(16), size(32), size(64)
    layers = [nn.Conv2d(3, one, 3, 2, 1, bias=False), nn.BatchNorm2d(one), nn.ReLU6(), DepthwiseBlock(one, two, 1)]
    layers += [DepthwiseBlock(two, three, 2), DepthwiseBlock(three, three, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(three, 10)), (3, 32, 32)


def _har(size: Any) -> tuple[nn.Module, tuple[int, ...]]:
    one, two, three = size(32), size(64), size(64)
    layers = [nn.Conv1d(9, one, 5, padding=2), nn.BatchNorm1d(one), nn.ReLU(), nn.MaxPool1d(2)]
    layers += [nn.Conv1d(one, two, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
    layers += [nn.Conv1d(two, three, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(three, 6)), (9, 128)


def _lstm(size: Any) -> tuple[nn.Module, tuple[int, ...]]:
    return Recurrent(size(32)), (min(32, size(28)), 9)


_BUILDERS = {"mlp": _mlp, "lenet": _lenet, "resnet8": _resnet8, "mobile": _mobile, "har": _har, "lstm": _lstm}
ARCHITECTURES = tuple(_BUILDERS)
