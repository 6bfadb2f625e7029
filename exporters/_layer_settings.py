# ruff: noqa: SLF001  torch keeps the base classes of its layers private
"""What the cost of a layer depends on beside its shapes, by torch's names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

Settings: TypeAlias = "dict[str, int | list[int] | str]"

_NAMES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "output_padding",
    "dilation",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "normalized_shape",
    "num_groups",
    "num_channels",
    "num_embeddings",
    "embedding_dim",
    "input_size",
    "hidden_size",
    "num_layers",
    "bidirectional",
    "proj_size",
    "batch_first",
    "embed_dim",
    "num_heads",
    "output_size",
    "scale_factor",
    "size",
    "ceil_mode",
    "approximate",
    "dim",
    "p",
)

# Positional arguments after the tensors, in torch's order.
_ARGUMENTS = {
    "max_pool": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool": ("kernel_size", "stride", "padding", "ceil_mode"),
    "adaptive_max_pool": ("output_size",),
    "adaptive_avg_pool": ("output_size",),
    "conv": ("stride", "padding", "dilation", "groups"),
    "mean": ("dim", "keepdim"),
    "sum": ("dim", "keepdim"),
    "softmax": ("dim",),
    "log_softmax": ("dim",),
    "cat": ("dim",),
    "stack": ("dim",),
    "getitem": (),
}

# Views of memory, and what has no node of its own.
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "expand"}
_FREE = _VIEWS | {"expand_as", "detach", "contiguous", "clone", "to", "float", "type_as", "get", "requires_grad"}


def module_settings(part: nn.Module) -> Settings:
    """Settings of a module of torch; nothing of other classes, whose attributes may mean anything."""
    if not type(part).__module__.startswith("torch.nn.modules"):
        return {}
    found: Settings = {}
    for name in _NAMES:
        value = _plain(getattr(part, name, None))
        if value is not None:
            found[name] = value
    if isinstance(part, (nn.modules.conv._ConvNd, nn.Linear)):
        found["bias"] = int(part.bias is not None)
    if isinstance(part, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        found["affine"] = int(part.affine)
    return found


def function_settings(kind: str, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> Settings:
    """Settings of a function from its arguments; ``given``: its tensors, the input first."""
    family = kind.rstrip("0123d")
    found: Settings = {}
    if family in {"conv", "linear"} and len(given) > 1:
        weight = given[1]
        if family == "linear":
            found = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        else:
            found = {"out_channels": weight.shape[0], "kernel_size": list(weight.shape[2:])}
        found["bias"] = int(len(given) > 2)
        args = (args[0], *args[3:])
    names = _ARGUMENTS.get(family, ())
    for name, value in (*zip(names, args[1:], strict=False), *kwargs.items()):
        plain = _plain(value)
        if plain is not None and name in {*names, "dim"}:
            found[name] = plain
    if family == "conv" and len(given) > 1:
        groups = found.get("groups", 1)
        found["in_channels"] = given[1].shape[1] * (groups if isinstance(groups, int) else 1)
    if family == "dropout":
        found["p"] = str(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    elif len(given) > 1 and family not in {"conv", "linear"}:
        found["operands"] = len(given)
        if given[1].shape != given[0].shape and kind != "cat":
            found["other_shape"] = list(given[1].shape)
    return found


def is_free(kind: str, args: Any, kwargs: Any, given: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether a function leaves nothing to do in the graph."""
    if kind in _FREE or given.dim() == 0:
        return True
    if kind in {"getitem", "narrow", "select", "pad"}:
        return made.numel() == given.numel()
    if kind == "dropout":
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return not training or probability == 0
    if kind in {"transpose", "permute", "t"}:
        return sum(size > 1 for size in given.shape) < 2
    return False


def _plain(value: Any) -> int | list[int] | str | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else str(value)
    if isinstance(value, (int, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(item, int) for item in value):
        return [int(item) for item in value]
    return None
