"""Positions of the entries of a sparse vector, tensor by tensor.

Of each tensor: whether it has entries, how many, then the gaps between them in the order of memory or, where that is
cheaper, of the transposed matrix (the first axis runs fastest): entries gather in the rows and columns of active
units. The class of a gap is coded by :mod:`edge_runtime.compression.sequences`, its low bits as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression import gaps, sequences
from edge_runtime.compression.rans import Model
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout
    from edge_runtime.compression.rans import Decoder, Encoder

_PRESENCE = [Model([64 - share, share]) for share in (1, 4, 16, 32, 48, 60, 63)]


def most_entries(size: int) -> int:
    """Entries that a sparse update of ``size`` elements may have: what has more is dense, and costs less so."""
    return max(1 << 16, size // 4)


class _Tensor(NamedTuple):
    """Entries of one tensor, ready to be written; ``turned`` is None where there is no choice of order."""

    size: int
    entries: int
    turned: bool | None = None
    classes: NDArray[np.int64] | None = None
    plan: sequences.Plan | None = None


class _Gaps(NamedTuple):
    """Gaps in front of entries: their classes, low bits and numbers of low bits; about what they cost."""

    classes: NDArray[np.int64]
    low: NDArray[np.int64]
    widths: NDArray[np.int64]
    cost: float

    @classmethod
    def between(cls, ascending: NDArray[np.int64]) -> _Gaps:
        """Of places, ``[k]``, k > 0."""
        steps = ascending.copy()
        steps[1:] -= ascending[:-1] + 1
        classes, widths = gaps.to_classes(steps)
        counts = np.bincount(classes)
        counts = counts[counts > 0]
        cost = float(counts @ np.log2(steps.size / counts)) + float(widths.sum())
        return cls(classes, steps & (1 << widths) - 1, widths, cost)


class Positions(NamedTuple):
    """A plan of writing positions.

    Attributes:
        bits: what it will cost.
        order: int64 ``[k]``: the entries, by their place in the given indices, in the order in which they travel.
    """

    bits: float
    order: NDArray[np.int64]
    tensors: list[_Tensor]
    low: NDArray[np.int64]
    widths: NDArray[np.int64]

    def write(self, encoder: Encoder) -> None:
        """All positions."""
        presence = _presence(self.tensors)
        sequences.write_uniform(encoder, presence, len(_PRESENCE))
        for tensor in self.tensors:
            _write_count(encoder, tensor, _PRESENCE[presence])
            if tensor.plan is None or tensor.classes is None:
                continue
            if tensor.turned is not None:
                encoder.raw(int(tensor.turned), 1)
            alphabet = gaps.class_count(tensor.size)
            derived = gaps.expected_gaps(tensor.entries, tensor.size)
            sequences.write(encoder, tensor.plan, tensor.classes, alphabet, derived)
        encoder.raws(self.low, self.widths)


def plan(indices: NDArray[np.int64], layout: Layout) -> Positions:
    """The cheapest way to write ``indices``, int64 ``[k]``, ascending and unique, all below ``layout.size``."""
    bits = 0.0
    tensors: list[_Tensor] = []
    orders: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    lows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    widths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    spans = list(layout.spans())
    bounds = np.searchsorted(indices, [0, *(end for *_, end in spans)]).tolist()
    for (_, shape, start, end), first, last in zip(spans, bounds, bounds[1:], strict=False):
        size, count = end - start, last - first
        if not count:
            tensors.append(_Tensor(size, 0))
            continue
        bits += math.log2(size.bit_length()) + count.bit_length() - 1
        local = indices[first:last] - start
        order = np.arange(count)
        chosen = _Gaps.between(local)
        turned = None
        if _is_matrix(shape):
            bits += 1
            turned = False
            rows, columns = shape[0], size // shape[0]
            other = local % columns * rows + local // columns
            other_order = np.argsort(other, kind="stable")
            other_gaps = _Gaps.between(other[other_order])
            if other_gaps.cost < chosen.cost:
                chosen, order, turned = other_gaps, other_order, True
        best = sequences.plan(chosen.classes, gaps.class_count(size), gaps.expected_gaps(count, size))
        tensors.append(_Tensor(size, count, turned, chosen.classes, best))
        bits += best.bits + int(chosen.widths.sum())
        orders.append(order + first)
        lows.append(chosen.low)
        widths.append(chosen.widths)
    present = _PRESENCE[_presence(tensors)].costs
    bits += math.log2(len(_PRESENCE)) + sum(
        float(present[int(tensor.entries > 0)]) for tensor in tensors if tensor.size
    )
    return Positions(bits, np.concatenate(orders), tensors, np.concatenate(lows), np.concatenate(widths))


def read(decoder: Decoder, layout: Layout) -> NDArray[np.int64]:
    """The positions, int64 ``[k]``, unique and below ``layout.size``, in the order in which they travelled.

    Raises:
        CodecError: damaged.
    """
    found, total = [], 0
    classes: list[int] = []
    presence = _PRESENCE[sequences.read_uniform(decoder, len(_PRESENCE))]
    for _, shape, start, end in layout.spans():
        size = end - start
        count = _read_count(decoder, size, presence)
        total += count
        if total > most_entries(layout.size):
            raise CodecError(f"{total} entries or more; a sparse update of this model has {most_entries(layout.size)}")
        if count:
            turned = bool(decoder.raw(1)) if _is_matrix(shape) else False
            expected = gaps.expected_gaps(count, size)
            classes += sequences.read(decoder, count, gaps.class_count(size), expected)
            found.append((count, turned, shape[0] if turned else 1, start, size))
    base, widths = gaps.class_base(np.array(classes, np.int64))
    steps = base + decoder.raws(widths).astype(np.int64) + 1
    parts = [np.empty(0, np.int64)]
    at = 0
    for count, turned, rows, start, size in found:
        local = np.cumsum(steps[at : at + count]) - 1
        at += count
        if local[-1] >= size:
            raise CodecError("a position lies outside its tensor")
        parts.append((local % rows * (size // rows) + local // rows if turned else local) + start)
    return np.concatenate(parts)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[0] > 1 and any(length > 1 for length in shape[1:])


def _presence(tensors: list[_Tensor]) -> int:
    """The model under which it costs least to say which tensors have entries."""
    present = [tensor.entries > 0 for tensor in tensors if tensor.size]
    yes = sum(present)
    costs = [float(model.costs @ [len(present) - yes, yes]) for model in _PRESENCE]
    return costs.index(min(costs))


def _write_count(encoder: Encoder, tensor: _Tensor, presence: Model) -> None:
    if not tensor.size:
        return
    encoder.symbols(presence, [int(tensor.entries > 0)])
    if tensor.entries:
        length = tensor.entries.bit_length()
        sequences.write_uniform(encoder, length - 1, tensor.size.bit_length())
        encoder.raw(tensor.entries, length - 1)


def _read_count(decoder: Decoder, size: int, presence: Model) -> int:
    if not size or not decoder.symbols(presence, 1)[0]:
        return 0
    length = sequences.read_uniform(decoder, size.bit_length())
    count = (1 << length) + decoder.raw(length)
    if count > size:
        raise CodecError(f"{count} entries in a tensor of {size}")
    return count
