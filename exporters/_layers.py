# ruff: noqa: SLF001  torch keeps the base classes of its layers private
"""The layer table: shapes, FLOPs and bytes of every module that holds parameters or has no children."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edge_runtime.bundle.manifest import Layer

if TYPE_CHECKING:
    from exporters._model import Model

ROOT = "(root)"

_FREE = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Embedding)


def layer_table(model: Model) -> list[Layer]:
    """One entry per layer, in the order of the first call; sizes and FLOPs are per sample of the forward pass.

    A module is a layer if it has no children or owns parameters itself. One that forward() never calls (its
    parameters are used directly) is listed last, with empty shapes.
    """
    found: dict[str, Layer] = {}
    handles = []
    for name, part in model.module.named_modules():
        if any(True for _ in part.children()) and not _own(part):
            continue

        def record(part: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if name not in found:
                found[name] = _measure(name, part, args, output)

        handles.append(part.register_forward_hook(record))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            model.module.eval()(model.example)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for handle in handles:
            handle.remove()
    for name, part in model.module.named_modules():
        if name not in found and _own(part):
            found[name] = _measure(name, part, (), None)
    return list(found.values())


def layer_of(tensor_name: str) -> str:
    """Name in the layer table of the module that owns a parameter or buffer."""
    return tensor_name.rpartition(".")[0] or ROOT


def _own(part: nn.Module) -> bool:
    tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
    return bool(tensors)


def _measure(name: str, part: nn.Module, args: Any, output: Any) -> Layer:
    given, result = _first(args), _first(output)
    input_shape = tuple(given.shape[1:]) if given is not None else ()
    output_shape = tuple(result.shape[1:]) if result is not None else ()
    held = (*part.parameters(recurse=False), *part.buffers(recurse=False))
    return Layer(
        name=name or ROOT,
        kind=type(part).__name__,
        input_shape=input_shape,
        output_shape=output_shape,
        flops=_flops(part, input_shape, output_shape),
        parameter_bytes=sum(value.numel() * value.element_size() for value in held),
        activation_bytes=4 * math.prod(output_shape) if result is not None else 0,
    )


def _first(value: Any) -> torch.Tensor | None:
    if isinstance(value, (tuple, list)):
        return _first(value[0]) if value else None
    return value if isinstance(value, torch.Tensor) else None


def _flops(part: Any, given: tuple[int, ...], result: tuple[int, ...]) -> int:  # noqa: PLR0911  one case per kind
    """Two per multiply-add; the usual counts, without index arithmetic."""
    size = math.prod(result)
    if isinstance(part, nn.modules.conv._ConvNd):
        per_value = 2 * (part.in_channels // part.groups) * math.prod(part.kernel_size)
        if part.transposed:
            return math.prod(given) * 2 * (part.out_channels // part.groups) * math.prod(part.kernel_size)
        return size * (per_value + (part.bias is not None))
    if isinstance(part, nn.Linear):
        return size * (2 * part.in_features + (part.bias is not None))
    if isinstance(part, nn.MultiheadAttention):
        length, width = (given[0], given[-1]) if len(given) > 1 else (1, given[-1] if given else 0)
        return 8 * length * width * width + 4 * length * length * width
    if isinstance(part, nn.RNNBase):
        steps = math.prod(given[:-1])
        return 2 * steps * sum(value.numel() for value in part.parameters(recurse=False) if value.dim() > 1)
    if isinstance(part, (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)):
        kernel: Any = part.kernel_size
        rank = len(result) - 1
        window: int = kernel**rank if isinstance(kernel, int) else math.prod(kernel)
        return size * window
    if isinstance(part, nn.modules.pooling._AdaptiveAvgPoolNd):
        return math.prod(given)
    if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
        return 4 * size
    if isinstance(part, _FREE) or any(True for _ in part.children()) or not result:
        return 0
    return size
