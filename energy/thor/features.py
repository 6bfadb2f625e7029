"""What a layer's cost depends on: logarithms of its sizes, of its work and of what it moves through memory.

Libraries of dense kernels work on blocks of channels, so their cost has steps where a smooth model sees none. Work and
traffic are therefore counted with channels rounded up to a block; which block is a matter of library and processor, and
found by fitting (`fitting.py`). Images of up to three channels have kernels of their own that waste less, so
the work is given both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.thor.layers import Sizes

Floats: TypeAlias = NDArray[np.float64]

# Blocks of channels that libraries use: none, 4 (NEON), 8 (AVX2, NEON twice), 16 (AVX-512), 32 (int8 and GPU tiles).
BLOCKS = (1, 4, 8, 16, 32)
IMAGE_CHANNELS = 3
SIZES = (
    "batch",
    "in_channels",
    "out_channels",
    "in_positions",
    "out_positions",
    "kernel_positions",
    "stride",
    "dilation",
    "groups",
    "elements",
)
# The positions of the input are in the elements of the input.
FEATURES = (
    "batch",
    "in_channels",
    "out_channels",
    "out_positions",
    "kernel_positions",
    "stride",
    "dilation",
    "groups",
    "blocked_flops",
    "flops",
    "input_elements",
    "output_elements",
)

_DENSE = ("conv", "linear", "bilinear")
_RECURRENT = {"rnn": 1, "gru": 3, "lstm": 4}  # gates


def features(kind: str, sizes: Sequence[Sizes], block: int = 1) -> Floats:
    """Natural logarithms, float64 ``[layers, len(FEATURES)]``; channels of dense kinds are rounded up to ``block``."""
    table = size_table(sizes)
    column = {name: table[:, index] for index, name in enumerate(SIZES)}
    inputs, outputs = column["in_channels"], column["out_channels"]
    if kind.startswith(_DENSE):
        wide_in, wide_out = _padded(inputs, block), _padded(outputs, block)
    else:
        wide_in, wide_out = inputs, outputs
    column["blocked_flops"] = 2 * _work(kind, column, block, image=False)
    column["flops"] = 2 * _work(kind, column, block, image=True)
    column["input_elements"] = column["batch"] * wide_in * column["in_positions"] * column["elements"]
    column["output_elements"] = column["batch"] * wide_out * column["out_positions"]
    result: Floats = np.log(np.column_stack([column[name] for name in FEATURES]))
    return result


def flops(kind: str, sizes: Sizes) -> float:
    """Floating-point operations of the forward pass of one step, 2 per multiply-add or value."""
    return float(np.exp(features(kind, [sizes])[0, FEATURES.index("flops")]))


def size_table(sizes: Sequence[Sizes]) -> Floats:
    """The sizes as numbers from 1, float64 ``[layers, len(SIZES)]``."""
    rows = [[max(1, row.get(name, 1)) for name in SIZES] for row in sizes]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(SIZES))


def _padded(channels: Floats, block: int) -> Floats:
    result: Floats = np.ceil(channels / block) * block
    return result


def _work(kind: str, column: dict[str, Floats], block: int, *, image: bool) -> Floats:
    """Multiply-adds, or values where there are none; ``image``: few input channels are not rounded up."""
    batch, inputs, outputs = column["batch"], column["in_channels"], column["out_channels"]
    positions, taps, groups = column["out_positions"], column["kernel_positions"], column["groups"]
    gates = next((number for name, number in _RECURRENT.items() if kind.startswith(name)), 0)
    if kind.startswith("optimizer"):
        work = column["elements"]
    elif gates:
        wide = _padded(outputs, block)
        work = batch * positions * gates * wide * (_padded(inputs, block) + wide)
    elif kind.startswith("multihead_attention"):
        work = batch * positions * inputs * (4 * outputs + 2 * positions)
    elif kind.startswith(_DENSE):
        each = inputs / groups
        # A depthwise kernel has one channel, and runs over groups instead.
        plain = (groups == inputs) | (image & (each <= IMAGE_CHANNELS))
        work = batch * positions * taps * np.where(plain, each, _padded(each, block)) * _padded(outputs, block)
    else:
        work = batch * np.maximum(inputs * column["in_positions"], outputs * positions * taps)
    result: Floats = work
    return result
