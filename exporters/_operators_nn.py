# ruff: noqa: PLR0917  signatures follow ATen schemas, whose arguments are positional
"""ONNX translations of matrix products, convolutions, normalisation, softmax and this package's own operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exporters import _random
from exporters._converter import ONNX_TYPE, Converter, Tensor, translates
from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence


def _gemm(c: Converter, a: Tensor, b: Tensor, bias: str = "", alpha: float = 1.0, beta: float = 1.0) -> str:
    """Matrix product that reads a transposed operand where it lies instead of transposing it first."""
    left, right = c.producer_transpose(a), c.producer_transpose(b)
    if not (left or right or bias):
        return c.op("MatMul", a, b)
    return c.op(
        "Gemm",
        left or a,
        right or b,
        *([bias] if bias else []),
        transA=1 if left else None,
        transB=1 if right else None,
        alpha=None if alpha == 1 else float(alpha),
        beta=None if beta == 1 else float(beta),
    )


@translates("aten.mm.default")
def _mm(c: Converter, a: Tensor, b: Tensor) -> str:
    return _gemm(c, a, b)


@translates("aten.addmm.default")
def _addmm(c: Converter, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> str:
    return _gemm(c, a, b, bias.name, alpha, beta)


@translates("aten.bmm.default", "aten.matmul.default")
def _bmm(c: Converter, a: Tensor, b: Tensor) -> str:
    return c.op("MatMul", a, b)


@translates("aten.baddbmm.default")
def _baddbmm(c: Converter, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> str:
    product = c.op("MatMul", a, b)
    if alpha != 1:
        product = c.op("Mul", product, c.scalar(alpha, a.dtype))
    added = c.op("Mul", x, c.scalar(beta, x.dtype)) if beta != 1 else x.name
    return c.op("Add", added, product)


@translates("aten.mv.default", "aten.dot.default")
def _mv(c: Converter, a: Tensor, b: Tensor) -> str:
    return c.op("MatMul", a, b)


@translates("aten._softmax.default")
def _softmax(c: Converter, x: Tensor, dim: int, _half_to_float: bool = False) -> str:
    return c.op("Softmax", x, axis=dim)


@translates("aten._log_softmax.default")
def _log_softmax(c: Converter, x: Tensor, dim: int, _half_to_float: bool = False) -> str:
    return c.op("LogSoftmax", x, axis=dim)


@translates("aten.embedding.default")
def _embedding(c: Converter, weight: Tensor, index: Tensor, *_: Any) -> str:
    return c.op("Gather", weight, index, axis=0)


@translates("aten.convolution.default")
def _convolution(
    c: Converter,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str:
    rank = len(x.shape) - 2
    stride, padding, dilation = (_per_axis(item, rank) for item in (stride, padding, dilation))
    common = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    inputs = [x, weight] if bias is None else [x, weight, bias]
    if not transposed:
        return c.op("Conv", *inputs, **common)
    extra = _per_axis(output_padding, rank)
    return c.op("ConvTranspose", *inputs, **common, output_padding=extra if any(extra) else None)


def _per_axis(values: Sequence[int], rank: int) -> list[int]:
    values = [int(value) for value in values]
    return values * rank if len(values) == 1 else values


@translates("edge.convolution_padded.default")
def _convolution_padded(
    c: Converter, x: Tensor, kernel: Tensor, pads: list[int], stride: list[int], dilation: list[int], groups: int
) -> str:
    return c.op("Conv", x, kernel, pads=pads, strides=stride, dilations=dilation, group=groups)


@translates("edge.batch_norm_train.default")
def _batch_norm_train(c: Converter, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[str, ...]:
    # With momentum 0 the running statistics that come out are the batch's, whatever finite values go in. The kernel
    # writes over those inputs, so each call needs two tensors of its own: computed ones, because initializers and
    # graph inputs would be written over too, and by a factor of their own, because onnxruntime merges equal nodes.
    c.calls += 1
    factor = c.scalar(1.0 + c.calls, torch.float32)
    mean, variance = c.op("Mul", weight, factor), c.op("Mul", bias, factor)
    return c.multi(
        "BatchNormalization",
        x,
        weight,
        bias,
        mean,
        variance,
        outputs=3,
        training_mode=1,
        momentum=0.0,
        epsilon=float(eps),
    )


@translates("aten._native_batch_norm_legit_no_training.default")
def _batch_norm_inference(
    c: Converter,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    _momentum: float,
    eps: float,
) -> tuple[str | None, ...]:
    scale = c.builder.constant(np.ones(mean.shape, np.float32)) if weight is None else weight
    shift = c.builder.constant(np.zeros(mean.shape, np.float32)) if bias is None else bias
    return c.op("BatchNormalization", x, scale, shift, mean, variance, epsilon=float(eps)), None, None


@translates("edge.scale_shift.default")
def _scale_shift(c: Converter, x: Tensor, scale: Tensor, shift: Tensor) -> str:
    # An inference-mode normalisation with mean 0 and variance 1 is one pass over x.
    zero = c.builder.constant(np.zeros(scale.shape, np.float32))
    one = c.builder.constant(np.ones(scale.shape, np.float32))
    return c.op("BatchNormalization", x, scale, shift, zero, one, epsilon=0.0)


@translates("edge.max_pool.default")
def _max_pool(
    c: Converter,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[str, ...]:
    return c.multi(
        "MaxPool",
        x,
        outputs=2,
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        ceil_mode=int(ceil_mode),
    )


@translates("edge.max_pool_backward.default")
def _max_pool_backward(c: Converter, gradient: Tensor, index: Tensor, x: Tensor, overlap: bool) -> str:
    zeros = c.op("Expand", c.scalar(0.0, torch.float32), c.op("Reshape", c.op("Size", x), c.ints(1)))
    flat_index, flat_gradient = (c.op("Reshape", item, c.ints(-1)) for item in (index, gradient))
    # Adding is needed, and paid for, only where one input may be the maximum of several windows.
    flat = c.op("ScatterElements", zeros, flat_index, flat_gradient, axis=0, reduction="add" if overlap else None)
    return c.reshape(flat, x.shape)


@translates("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def _avg_pool(
    c: Converter,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    rank = len(kernel) if len(kernel) > 1 else len(c.out().shape) - 2
    if divisor_override is not None:
        raise ExportError("average pooling with divisor_override; multiply the result in the model instead")
    size = _per_axis(kernel, rank)
    return c.op(
        "AveragePool",
        x,
        kernel_shape=size,
        strides=_per_axis(stride, rank) if stride else size,
        pads=_per_axis(padding, rank) * 2,
        ceil_mode=int(ceil_mode),
        count_include_pad=int(count_include_pad),
    )


@translates("aten.native_layer_norm.default")
def _layer_norm(
    c: Converter, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[str, ...]:
    scale = c.builder.constant(np.ones(tuple(shape), np.float32)) if weight is None else weight.name
    inputs = [x.name, scale] if bias is None else [x.name, scale, bias.name]
    axis = len(x.shape) - len(shape)
    return c.multi("LayerNormalization", *inputs, outputs=3, axis=axis, epsilon=float(eps))


@translates("edge.bernoulli.default")
def _bernoulli(c: Converter, like: Tensor, seed: Tensor, stream: int, keep: float) -> str:
    """1 with probability ``keep``: the counter hash of `_random.bernoulli`, operator by operator."""

    def number(value: int) -> str:
        return c.scalar(value, torch.int64)

    def folded(value: str, shift: int) -> str:
        return c.op("BitwiseXor", value, c.op("Div", value, number(2**shift)))

    def mixed(value: str, key: str) -> str:
        for step in _random.ROUNDS:
            value = c.op("Mul", folded(value, step.shift), number(step.factor))
            value = c.op("BitwiseXor", c.op("BitwiseAnd", value, number(_random.MASK)), key)
        return folded(value, _random.LAST_SHIFT)

    low = c.op("BitwiseAnd", seed, number(_random.MASK))
    high = c.op("BitwiseAnd", c.op("Div", c.op("Sub", seed, low), number(2**31)), number(_random.MASK))
    first = mixed(c.op("BitwiseXor", low, number(_random.stream_key(stream))), high)
    second = mixed(first, number(_random.SECOND))
    index = c.op("Range", number(0), c.op("Size", like), number(1))
    kept = c.op("Less", mixed(c.op("BitwiseXor", index, first), second), number(_random.threshold(keep)))
    return c.reshape(c.op("Cast", kept, to=ONNX_TYPE[like.dtype]), like.shape)
