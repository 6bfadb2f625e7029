# ruff: noqa: PLR0917, SLF001  signatures follow ATen schemas, and some ATen operators have a leading underscore
"""Decomposition table of a trace: from what autograd emits to operators that have an ONNX translation.

PyTorch's own core and backward decompositions, with faster forms for what costs the time in small networks: the
weight gradient of a convolution, BatchNorm, ReLU and max-pooling.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from exporters._own_operators import edge, per_channel
from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

aten = torch.ops.aten

_BACKWARD = [
    "_log_softmax_backward_data",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_softmax_backward_data",
    "elu",
    "elu_backward",
    "embedding_dense_backward",
    "gelu_backward",
    "glu",
    "glu_backward",
    "hardsigmoid",
    "hardsigmoid_backward",
    "hardswish",
    "hardswish_backward",
    "hardtanh_backward",
    "leaky_relu_backward",
    "log_sigmoid_backward",
    "log_sigmoid_forward",
    "logit_backward",
    "mish_backward",
    "mse_loss_backward",
    "native_group_norm",
    "native_group_norm_backward",
    "native_layer_norm_backward",
    "native_dropout_backward",
    "prelu_backward",
    "_prelu_kernel",
    "_prelu_kernel_backward",
    "select_backward",
    "sigmoid_backward",
    "silu_backward",
    "slice_backward",
    "softplus_backward",
    "tanh_backward",
    "threshold_backward",
    "unfold_backward",
    "upsample_nearest2d_backward",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
]
# One ONNX operator each, so not taken apart.
_KEPT = (
    "addmm.default",
    "gelu.default",
    "native_layer_norm.default",
    "hardtanh.default",
    "leaky_relu.default",
    "baddbmm.default",
)

# Channels of a depthwise convolution that are computed together as one dense block; 8 was the fastest of 4, 8, 16.
_BLOCK = 8


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """The table for `make_fx`."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    table.update(get_decompositions([getattr(aten, name) for name in _BACKWARD if hasattr(aten, name)]))
    for name in _KEPT:
        packet, overload = name.split(".")
        table.pop(getattr(getattr(aten, packet), overload), None)
    table[aten.convolution_backward.default] = _convolution_backward
    # Which of these appears depends on whether the batch is symbolic, and on the version of torch.
    for name in ("native_batch_norm", "_native_batch_norm_legit"):
        table[getattr(aten, name).default] = _batch_norm
    table[aten._native_batch_norm_legit.no_stats] = _batch_norm_without_statistics
    table[aten.native_batch_norm_backward.default] = _batch_norm_backward
    table[aten.threshold_backward.default] = _threshold_backward
    table[aten.hardtanh_backward.default] = _hardtanh_backward
    for rank in (2, 3):
        table[getattr(aten, f"max_pool{rank}d_with_indices").default] = _max_pool
        table[getattr(aten, f"max_pool{rank}d_with_indices_backward").default] = _max_pool_backward
        table[getattr(aten, f"avg_pool{rank}d_backward").default] = _avg_pool_backward
    table[aten._adaptive_avg_pool2d.default] = _adaptive_avg_pool
    table[aten._adaptive_avg_pool2d_backward.default] = _adaptive_avg_pool_backward
    return table


def _per_axis(values: Sequence[int], rank: int) -> list[int]:
    return list(values) * rank if len(values) == 1 else list(values)


# Convolution --------------------------------------------------------------------------------------------------


def _convolution_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    del bias_sizes, output_padding
    rank = x.dim() - 2
    stride, padding, dilation = (_per_axis(item, rank) for item in (stride, padding, dilation))
    for_x = for_weight = for_bias = None
    if output_mask[0]:
        extra = [0] * rank
        if not transposed:  # what the convolution left over at the end of each axis
            reach = [dilation[i] * (weight.shape[2 + i] - 1) + 1 - 2 * padding[i] for i in range(rank)]
            extra = [x.shape[2 + i] - (gradient.shape[2 + i] - 1) * stride[i] - reach[i] for i in range(rank)]
        for_x = aten.convolution.default(
            gradient, weight, None, stride, padding, dilation, not transposed, extra, groups
        )
    if output_mask[1]:
        # A transposed convolution is a convolution with input and output exchanged.
        large, small = (gradient, x) if transposed else (x, gradient)
        for_weight = weight_gradient(small, large, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        for_bias = gradient.sum([0, *range(2, x.dim())])
    return for_x, for_weight, for_bias


def weight_gradient(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Gradient of a convolution's weight ``[out, in/groups, *kernel]``.

    Pointwise: one matrix product. Else one convolution whose kernel is the output gradient and whose input has its
    channels merged into the last axis, so that the product inside has ``kernel * channels`` columns, not ``kernel``.
    """
    kernel = list(weight.shape[2:])
    if all(size == 1 for size in (*kernel, *stride)) and not any(padding) and groups == 1:
        left = gradient.flatten(2).transpose(0, 1).reshape(gradient.shape[1], -1)
        right = x.flatten(2).transpose(0, 1).reshape(x.shape[1], -1)
        return (left @ right.t()).reshape(weight.shape)
    if dilation[-1] != 1:
        return _weight_gradient_by_channel(gradient, x, weight, stride, padding, dilation, groups)
    return _weight_gradient_wide(gradient, x, weight, stride, padding, dilation, groups)


def _weight_gradient_wide(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    rank, batch, kernel = x.dim() - 2, x.shape[0], list(weight.shape[2:])
    end = []
    for i in range(rank):  # end padding that leaves exactly kernel[i] positions; a negative one becomes a slice
        missing = stride[i] * (gradient.shape[2 + i] - 1) + dilation[i] * (kernel[i] - 1) - padding[i]
        missing -= x.shape[2 + i] - 1
        if missing < 0:
            x = x.narrow(2 + i, 0, x.shape[2 + i] + missing)
        end.append(max(missing, 0))
    sizes, inner, outer = list(x.shape[2:]), x.shape[1] // groups, gradient.shape[1] // groups
    block = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * inner <= _BLOCK))
    count, channels = groups // block, block * inner
    # Both forms avoid a transpose of five axes, which is slow in onnxruntime.
    if count == 1:
        wide = x.permute(0, *range(2, 2 + rank), 1)
    else:
        wide = x.transpose(0, 1).reshape(count, channels, batch * math.prod(sizes)).transpose(1, 2)
    wide = wide.reshape(1, count * batch, *sizes[:-1], sizes[-1] * channels)
    pads = [*padding[:-1], padding[-1] * channels, *end[:-1], end[-1] * channels]
    result: torch.Tensor = edge.convolution_padded(
        wide, gradient.transpose(0, 1), pads, dilation, [*stride[:-1], stride[-1] * channels], count
    )
    if block > 1:
        result = result.reshape(count, block, outer, *kernel, block, inner)
        diagonal = torch.eye(block, dtype=x.dtype).reshape(1, block, 1, *[1] * rank, block, 1)
        result = (result * diagonal).sum(-2)
    result = result.reshape(weight.shape[0], *kernel, inner)
    return result.permute(0, rank + 1, *range(1, rank + 1))


def _weight_gradient_by_channel(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Convolution with batch and channel exchanged, and so stride and dilation; slower, for any dilation."""
    rank, batch = x.dim() - 2, x.shape[0]
    inner, outer = x.shape[1] // groups, gradient.shape[1] // groups
    rest = range(3, 3 + rank)
    swapped = x.reshape(batch, groups, inner, *x.shape[2:]).permute(2, 1, 0, *rest)
    swapped = swapped.reshape(inner, groups * batch, *x.shape[2:])
    taps = gradient.reshape(batch, groups, outer, *gradient.shape[2:]).permute(1, 2, 0, *rest)
    taps = taps.reshape(groups * outer, batch, *gradient.shape[2:])
    result: torch.Tensor = aten.convolution.default(
        swapped, taps, None, dilation, padding, stride, False, [0] * rank, groups
    )
    result = result.transpose(0, 1)
    for i in range(rank):
        result = result.narrow(2 + i, 0, weight.shape[2 + i])
    return result


# BatchNorm ----------------------------------------------------------------------------------------------------


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels = x.shape[1]
    if not training:
        assert running_mean is not None
        assert running_var is not None
        scale = torch.rsqrt(running_var + eps) if weight is None else weight * torch.rsqrt(running_var + eps)
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        return edge.scale_shift(x, scale, shift), x.new_zeros(0), x.new_zeros(0)
    if weight is not None and bias is not None:
        y, mean, variance = edge.batch_norm_train(x, weight, bias, eps)
    else:
        y, mean, variance = _normalised(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        count = x.numel() // channels
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        # torch keeps the unbiased variance in the running statistics
        running_var.copy_(variance * (momentum * (count / (count - 1))) + (1 - momentum) * running_var)
    return y, mean, torch.rsqrt(variance + eps)


def _normalised(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNorm without a scale or a shift, in plain operators."""
    rank = x.dim()
    variance, mean = torch.var_mean(x, [0, *range(2, rank)], correction=0)
    scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
    y = (x - per_channel(mean, rank)) * per_channel(scale, rank)
    return y if bias is None else y + per_channel(bias, rank), mean, variance


def _batch_norm_without_statistics(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _batch_norm(x, weight, bias, None, None, training, momentum, eps)


def _batch_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    saved_mean: torch.Tensor | None,
    saved_invstd: torch.Tensor | None,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``dx = a*g + c + s*(x - mean)`` with one number per channel for a, c and s."""
    rank, axes = x.dim(), [0, *range(2, x.dim())]
    if training:
        mean, invstd = saved_mean, saved_invstd
    else:
        assert running_var is not None
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
    assert mean is not None
    assert invstd is not None
    centred = x - per_channel(mean, rank)
    total, product = gradient.sum(axes), (gradient * centred).sum(axes)
    scale = invstd if weight is None else weight * invstd
    for_x = None
    if output_mask[0] and training:
        share = x.shape[1] / x.numel()
        slope = scale * invstd * invstd * product * (-share)
        for_x = _scaled(gradient, scale, scale * total * (-share)) + centred * per_channel(slope, rank)
    elif output_mask[0]:
        for_x = gradient * per_channel(scale, rank)
    return for_x, product * invstd if output_mask[1] else None, total if output_mask[2] else None


def _scaled(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``scale*x + shift`` per channel; in one node where the number of channels is known."""
    channels: Any = x.shape[1]
    if isinstance(channels, int):
        scaled: torch.Tensor = edge.scale_shift(x, scale, shift)
        return scaled
    return x * per_channel(scale, x.dim()) + per_channel(shift, x.dim())


# Activations and pooling --------------------------------------------------------------------------------------


def _threshold_backward(gradient: torch.Tensor, x: torch.Tensor, threshold: float) -> torch.Tensor:
    return gradient * (x > threshold).to(gradient.dtype)


def _hardtanh_backward(gradient: torch.Tensor, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return gradient * ((x > low) & (x < high)).to(gradient.dtype)


def _max_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = x.dim() - 2
    size = _per_axis(kernel, rank)
    step = _per_axis(stride, rank) if stride else size
    values, index = edge.max_pool(x, size, step, _per_axis(padding, rank), _per_axis(dilation, rank), ceil_mode)
    return values, index


def _max_pool_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    index: torch.Tensor,
) -> torch.Tensor:
    del padding, ceil_mode
    rank = x.dim() - 2
    size = _per_axis(kernel, rank)
    step = _per_axis(stride, rank) if stride else size
    reach = [d * (k - 1) + 1 for k, d in zip(size, _per_axis(dilation, rank), strict=True)]
    overlap = any(r > s for r, s in zip(reach, step, strict=True))
    result: torch.Tensor = edge.max_pool_backward(gradient, index, x, overlap)
    return result


def _avg_pool_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> torch.Tensor:
    """Spreads each gradient evenly over its window: a transposed depthwise convolution with equal weights."""
    rank = x.dim() - 2
    size = _per_axis(kernel, rank)
    step, pad = _per_axis(stride, rank) if stride else size, _per_axis(padding, rank)
    reach = [(gradient.shape[2 + i] - 1) * step[i] + size[i] - 2 * pad[i] for i in range(rank)]
    extra = [x.shape[2 + i] - reach[i] for i in range(rank)]
    if divisor_override is not None or (any(pad) and not count_include_pad) or any(item < 0 for item in extra):
        raise ExportError(
            "average pooling with ceil_mode, divisor_override or count_include_pad=False cannot be trained; "
            f"use padding inside the windows (kernel {size}, stride {step}, ceil_mode={ceil_mode})"
        )
    weight = x.new_full((x.shape[1], 1, *size), 1.0 / math.prod(size))
    dilation = [1] * rank
    result: torch.Tensor = aten.convolution.default(
        gradient, weight, None, step, pad, dilation, True, extra, x.shape[1]
    )
    return result


def _averaging(inputs: int, outputs: int) -> torch.Tensor:
    """Matrix ``[outputs, inputs]`` that averages the windows of an adaptive pool along one axis."""
    rows = []
    for index in range(outputs):
        start, end = index * inputs // outputs, -(-(index + 1) * inputs // outputs)
        rows.append([1.0 / (end - start) if start <= i < end else 0.0 for i in range(inputs)])
    return torch.tensor(rows)


def _adaptive_avg_pool(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    left, right = (_averaging(x.shape[axis], size) for axis, size in zip((-2, -1), sizes, strict=True))
    return torch.matmul(torch.matmul(left, x), right.t())


def _adaptive_avg_pool_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    left, right = (_averaging(x.shape[axis], gradient.shape[axis]) for axis in (-2, -1))
    return torch.matmul(torch.matmul(left.t(), gradient), right)
