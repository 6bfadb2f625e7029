"""Torch modules that stand for one layer of a table, to be traced alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from energy.thor.layers import canonical

if TYPE_CHECKING:
    from collections.abc import Callable

    from energy.thor.layers import Entry

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "logsigmoid": nn.LogSigmoid,
}
_POOLS = {"max_pool": "MaxPool", "avg_pool": "AvgPool"}
_ADAPTIVE = {"adaptive_avg_pool": "AdaptiveAvgPool", "adaptive_max_pool": "AdaptiveMaxPool"}
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}
_HALF = 0.5


class Apply(nn.Module):
    """A function as a module, with parameters where it needs some."""

    def __init__(self, function: Callable[..., torch.Tensor], operands: int = 1, shape: tuple[int, ...] = ()) -> None:
        """``operands``: tensors with a batch axis; ``shape``: of a trained tensor beside them, if it has one."""
        super().__init__()
        self.function = function
        self.operands = operands
        self.weight = nn.Parameter(torch.full(shape, _HALF)) if shape else None

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """``[batch, ...]`` each to ``[batch, ...]``."""
        return self.function(*values) if self.weight is None else self.function(*values, self.weight)


class States(nn.Module):
    """All states of a recurrent layer: ``[batch, steps, inputs]`` to ``[batch, steps, hidden]``."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """States of every step."""
        states: torch.Tensor = self.cell(x)[0]
        return states


class SelfAttention(nn.Module):
    """Attention of tokens to each other: ``[batch, tokens, features]`` to the same."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attended tokens."""
        result: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


def build(entry: Entry) -> nn.Module | None:
    """The module that computes an elementary entry of a layer table; None if there is none for its kind.

    Raises:
        (KeyError, TypeError, ValueError, RuntimeError): the entry's settings fit no such module.
    """
    kind, settings = canonical(entry["kind"]), entry["settings"]
    if kind.startswith("conv"):
        name = "".join(part.capitalize() for part in kind.split("_"))
        named = {key: _tuple(settings[key]) for key in _CONVOLUTION if key in settings}
        if "output_padding" in settings and "transpose" in kind:
            named["output_padding"] = _tuple(settings["output_padding"])
        module: nn.Module = getattr(nn, name)(**named, bias=bool(settings.get("bias")))
        return module
    for family in (_layer, _pool, _function):
        found = family(kind, entry, settings)
        if found is not None:
            return found
    return None


def _layer(kind: str, entry: Entry, settings: Any) -> nn.Module | None:
    given = entry["input_shape"]
    makers: dict[str, Callable[[], nn.Module]] = {
        **_ACTIVATIONS,
        "linear": lambda: nn.Linear(given[-1], entry["output_shape"][-1], bool(settings.get("bias", 1))),
        "batch_norm1d": lambda: nn.BatchNorm1d(given[0], affine=bool(settings.get("affine", 1))),
        "batch_norm2d": lambda: nn.BatchNorm2d(given[0], affine=bool(settings.get("affine", 1))),
        "layer_norm": lambda: nn.LayerNorm(settings.get("normalized_shape", given[-1])),
        "group_norm": lambda: nn.GroupNorm(settings["num_groups"], given[0]),
        "embedding": lambda: nn.Embedding(settings["num_embeddings"], entry["output_shape"][-1]),
        "lstm": lambda: States(nn.LSTM(given[-1], settings["hidden_size"], batch_first=True)),
        "gru": lambda: States(nn.GRU(given[-1], settings["hidden_size"], batch_first=True)),
        "rnn": lambda: States(nn.RNN(given[-1], settings["hidden_size"], batch_first=True)),
        "multihead_attention": lambda: SelfAttention(given[-1], settings["num_heads"]),
    }
    return makers[kind]() if kind in makers else None


def _pool(kind: str, entry: Entry, settings: Any) -> nn.Module | None:
    family, rank = kind[:-2], kind[-2:]
    if family in _POOLS:
        names = ("kernel_size", "stride", "padding", "ceil_mode")
        named = {key: _tuple(settings[key]) for key in names if key in settings}
        named["ceil_mode"] = bool(settings.get("ceil_mode"))
        pool: nn.Module = getattr(nn, _POOLS[family] + rank)(**named)
        return pool
    if family in _ADAPTIVE:
        size = tuple(entry["output_shape"][1:])
        adaptive: nn.Module = getattr(nn, _ADAPTIVE[family] + rank)(size)
        return adaptive
    return None


def _function(kind: str, entry: Entry, settings: Any) -> nn.Module | None:
    given = math.prod(entry["input_shape"])
    if kind in _BINARY:
        return _binary(_BINARY[kind], settings)
    makers: dict[str, Callable[[], nn.Module]] = {
        "cat": lambda: Apply(lambda x, y: torch.cat([x, y], 1), operands=2),
        "getitem": lambda: Apply(lambda x: x[:, -1]),
        "softmax": lambda: Apply(lambda x: functional.softmax(x, int(settings.get("dim", -1)))),
        "log_softmax": lambda: Apply(lambda x: functional.log_softmax(x, int(settings.get("dim", -1)))),
        "mean": lambda: Apply(lambda x: x.mean(_axes(settings.get("dim"), len(entry["input_shape"])))),
        "sum": lambda: Apply(lambda x: x.sum(_axes(settings.get("dim"), len(entry["input_shape"])))),
        "dropout": lambda: Apply(lambda x: functional.dropout(x, float(settings.get("p", _HALF)))),
    }
    if kind == "getitem" and given % math.prod(entry["output_shape"]):
        return None
    return makers[kind]() if kind in makers else None


def _binary(operator: Callable[[Any, Any], Any], settings: Any) -> nn.Module:
    if "other_shape" in settings:
        return Apply(operator, shape=tuple(settings["other_shape"]))
    if settings.get("operands", 1) > 1:
        return Apply(operator, operands=2)
    return Apply(lambda x: operator(x, _HALF))


def input_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of the probe's inputs without the batch axis; where only the number of values counts it may differ."""
    kind, shape = canonical(entry["kind"]), tuple(entry["input_shape"])
    if kind == "getitem":
        made = math.prod(entry["output_shape"])
        return math.prod(shape) // made, made
    if kind == "cat":  # two halves
        return (max(math.prod(entry["output_shape"]) // 2, 1),)
    return shape


def output_shape(entry: Entry) -> list[int] | None:
    """Shape of the output without the batch axis, found by running the layer; None if the entry fits no layer."""
    if entry.get("output_shape") is not None and not canonical(entry["kind"]).startswith("conv"):
        shape = list(entry["output_shape"])
        if "pool" not in canonical(entry["kind"]):
            return shape
    try:
        module = build(entry)
        if module is None:
            return None
        with torch.no_grad():
            output = module.eval()(torch.zeros(2, *input_shape(entry)))
    except (KeyError, TypeError, ValueError, RuntimeError):  # torch has no such layer: the kernel is larger than x, ...
        return None
    return list(output.shape[1:])


def _axes(value: Any, rank: int) -> list[int]:
    if value is None:
        return list(range(1, rank + 1))
    return [value] if isinstance(value, int) else list(value)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
