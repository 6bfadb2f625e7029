"""What a layer's cost depends on: logarithms of its sizes, of its work and of what it moves through memory.

Libraries of dense kernels work on blocks of channels, so their cost has steps where a smooth model sees none. The work
is therefore counted with channels rounded up to a block. Which block is a matter of the library and the processor, and
found by fitting (:mod:`energy.fitting`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.layers import Sizes

Floats: TypeAlias = NDArray[np.float64]

# Blocks of channels that libraries use: none, 4 (NEON), 8 (AVX2, NEON twice), 16 (AVX-512), 32 (int8 and GPU tiles).
BLOCKS = (1, 4, 8, 16, 32)
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
FEATURES = (*SIZES, "flops", "input_elements", "output_elements", "weight_elements")

_DENSE = ("conv", "linear", "bilinear", "multihead_attention")
_RECURRENT = {"rnn": 1, "gru": 3, "lstm": 4}  # gates


def features(kind: str, sizes: Sequence[Sizes], block: int = 1) -> Floats:
    """Natural logarithms, float64 ``[layers, len(FEATURES)]``; work counted with channels padded to ``block``."""
    table = np.array([[max(1, row.get(name, 1)) for name in SIZES] for row in sizes], dtype=np.float64)
    table = table.reshape(len(sizes), len(SIZES))
    batch, inputs, outputs, in_positions, out_positions = table[:, :5].T
    work = _multiply_adds(kind, table, block)
    moved = (batch * inputs * in_positions, batch * outputs * out_positions, _weights(kind, table))
    result: Floats = np.log(np.column_stack([table, 2 * work, *moved]))
    return result


def flops(kind: str, sizes: Sizes) -> float:
    """Floating-point operations of the forward pass of one step, 2 per multiply-add; 1 per value where none."""
    return float(np.exp(features(kind, [sizes])[0, FEATURES.index("flops")]))


def _padded(channels: Floats, block: int) -> Floats:
    result: Floats = np.ceil(channels / block) * block
    return result


def _gates(kind: str) -> int:
    return next((gates for name, gates in _RECURRENT.items() if kind.startswith(name)), 0)


def _multiply_adds(kind: str, table: Floats, block: int) -> Floats:
    batch, inputs, outputs, _, positions, taps, _, _, groups, elements = table.T
    work: Floats = batch * positions * taps * outputs
    if kind.startswith("optimizer"):
        work = elements
    elif gates := _gates(kind):
        wide = _padded(outputs, block)
        work = batch * positions * gates * wide * (_padded(inputs, block) + wide)
    elif kind.startswith(_DENSE):
        # Channels of a group are padded by themselves; a depthwise kernel has one, and runs over channels instead.
        depthwise = groups == inputs
        each = np.where(depthwise, 1.0, _padded(inputs / groups, block))
        work = batch * positions * taps * each * _padded(outputs, block)
    return work


def _weights(kind: str, table: Floats) -> Floats:
    _, inputs, outputs, _, _, taps, _, _, groups, elements = table.T
    count: Floats = outputs
    if kind.startswith("optimizer"):
        count = elements
    elif gates := _gates(kind):
        count = gates * outputs * (inputs + outputs)
    elif kind.startswith(_DENSE):
        count = inputs / groups * outputs * taps
    return count
