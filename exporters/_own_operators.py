# ruff: noqa: PLR0917  signatures follow ATen schemas, whose arguments are positional
"""Operators of this exporter, in the torch library ``edge``: what ATen cannot say and ONNX can say in one node.

Each has an eager form (reference, and for tests), a shape rule for tracing, and a translation in `_operators_nn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import library as operators
from torch.nn import functional

from exporters import _random

if TYPE_CHECKING:
    from collections.abc import Sequence

_operators: Any = operators  # untyped
_LIBRARY = _operators.Library("edge", "DEF")
_LIBRARY.define(
    "convolution_padded(Tensor x, Tensor kernel, int[] pads, int[] stride, int[] dilation, int groups) -> Tensor"
)
_LIBRARY.define("batch_norm_train(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("scale_shift(Tensor x, Tensor scale, Tensor shift) -> Tensor")
_LIBRARY.define(
    "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> (Tensor, Tensor)"
)
_LIBRARY.define("max_pool_backward(Tensor gradient, Tensor index, Tensor x, bool overlap) -> Tensor")
_LIBRARY.define("bernoulli(Tensor like, Tensor seed, int stream, float keep) -> Tensor")

edge: Any = torch.ops.edge


def per_channel(vector: torch.Tensor, rank: int) -> torch.Tensor:
    """A vector shaped to broadcast along axis 1 of a tensor of ``rank`` axes."""
    return vector.reshape(1, -1, *[1] * (rank - 2))


def _convolution_padded(
    x: torch.Tensor, kernel: torch.Tensor, pads: list[int], stride: list[int], dilation: list[int], groups: int
) -> torch.Tensor:
    rank = x.dim() - 2
    sides = [pads[axis + end] for axis in reversed(range(rank)) for end in (0, rank)]
    padded = functional.pad(x, sides)
    return torch.convolution(padded, kernel, None, stride, [0] * rank, dilation, False, [0] * rank, groups)


def _convolution_padded_shape(
    x: torch.Tensor, kernel: torch.Tensor, pads: list[int], stride: list[int], dilation: list[int], _groups: int
) -> torch.Tensor:
    rank = x.dim() - 2
    sizes = [
        (x.shape[2 + i] + pads[i] + pads[rank + i] - dilation[i] * (kernel.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(rank)
    ]
    return x.new_empty((x.shape[0], kernel.shape[0], *sizes))


def _batch_norm_train(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    axes = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x, axes, correction=0)
    scale = (variance + eps).rsqrt() * weight
    rank = x.dim()
    return (x - per_channel(mean, rank)) * per_channel(scale, rank) + per_channel(bias, rank), mean, variance


def _batch_norm_train_shape(
    x: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor, _eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _scale_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return x * per_channel(scale, x.dim()) + per_channel(shift, x.dim())


def _plain_max_pool(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pool = {
        4: torch.ops.aten.max_pool2d_with_indices.default,
        5: torch.ops.aten.max_pool3d_with_indices.default,
    }[x.dim()]
    values, index = pool(x, *options)
    return values, index


def _max_pool(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values, index = _plain_max_pool(x, *options)
    # ONNX counts over the whole tensor, torch within each plane.
    plane = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
    return values, index + plane * (x[0, 0].numel())


def _max_pool_backward(gradient: torch.Tensor, index: torch.Tensor, x: torch.Tensor, _overlap: bool) -> torch.Tensor:
    flat = torch.zeros(x.numel(), dtype=gradient.dtype)
    return flat.scatter_add(0, index.reshape(-1), gradient.reshape(-1)).reshape(x.shape)


def _like_last(_gradient: torch.Tensor, _index: torch.Tensor, x: torch.Tensor, _overlap: bool) -> torch.Tensor:
    return torch.empty_like(x)


def _like_first(x: torch.Tensor, *_: Sequence[Any]) -> torch.Tensor:
    return torch.empty_like(x)


for _name, _eager, _shape in (
    ("convolution_padded", _convolution_padded, _convolution_padded_shape),
    ("batch_norm_train", _batch_norm_train, _batch_norm_train_shape),
    ("scale_shift", _scale_shift, _like_first),
    ("max_pool", _max_pool, _plain_max_pool),
    ("max_pool_backward", _max_pool_backward, _like_last),
    ("bernoulli", _random.bernoulli, _like_first),
):
    _LIBRARY.impl(_name, _eager, "CPU")
    _LIBRARY.impl(_name, _shape, "Meta")
