"""Short sequences of small symbols, coded with the model that costs least, its own description included.

The model of a sequence is one of these, for the whole of it or one for each range of the symbol before:

* *derived*: what the caller expects, without any description;
* *bank*: a Weibull law of gaps, two parameters in 9 bits (gaps between hits in clusters have a heavy tail);
* *table*: the frequencies themselves, their logarithms to base 2 in half steps, as differences.

All weights are computed in integers, so both ends have the same ones.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.gaps import bank
from edge_runtime.compression.rans import Model
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edge_runtime.compression.rans import Decoder, Encoder

_DERIVED, _BANK, _TABLE = 0, 1, 3  # bank of 1 or 2 ranges, table of 1 to 4
_KINDS = 7
_LEAST_FOR_TABLE = 6
_MAX_LEVEL = 64


@lru_cache(maxsize=32)
def _bank_costs(alphabet: int) -> NDArray[np.float64]:
    weights = bank()[:, :alphabet].astype(np.float64)
    costs: NDArray[np.float64] = np.log2(weights.sum(axis=1, keepdims=True)) - np.log2(weights)
    return costs


@lru_cache(maxsize=64)
def _bank_model(law: int, alphabet: int) -> Model:
    return Model(bank()[law, :alphabet].tolist())


@lru_cache(maxsize=256)
def uniform(count: int) -> Model:
    """All of ``count`` symbols alike."""
    return Model([1] * count)


def write_uniform(encoder: Encoder, value: int, count: int) -> None:
    """A number below ``count``, at most 4096."""
    encoder.symbols(uniform(count), [value])


def read_uniform(decoder: Decoder, count: int) -> int:
    """The inverse."""
    return decoder.symbols(uniform(count), 1)[0]


class Plan(NamedTuple):
    """How a sequence will be coded. ``rows``: per range a law of the bank, or the levels of a table."""

    bits: float
    kind: int
    splits: list[int]
    rows: list[int] | list[list[int]]


def plan(symbols: NDArray[np.int64], alphabet: int, derived: int | None = None) -> Plan:
    """The cheapest model.

    Args:
        symbols: ``[n]``, n > 0, below ``alphabet``.
        alphabet: number of symbols, at most 4096; of gaps at most 200.
        derived: law of the bank that the caller expects; None: the symbols are no gaps, all alike is expected.
    """
    before = np.concatenate([[0], symbols[:-1]])
    count = symbols.size
    head = math.log2(_KINDS)
    single = np.bincount(symbols, minlength=alphabet)
    expected = count * math.log2(alphabet) if derived is None else float(_bank_costs(alphabet)[derived] @ single)
    best = Plan(expected + head, _DERIVED, [], [])
    joint: NDArray[np.int64] = single[None, :]
    if count >= 2 * _LEAST_FOR_TABLE:
        joint = np.bincount(before * alphabet + symbols, minlength=alphabet * alphabet).reshape(alphabet, alphabet)
    divisions = _divisions(joint, count)
    tables = _table_costs(np.concatenate([counts for _, counts in divisions])) if divisions else np.empty(0)
    at = 0
    for splits, counts in divisions:
        ranges = len(counts)
        bits = head + len(splits) * math.log2(alphabet)
        if derived is not None and ranges <= 2:
            costs = _bank_costs(alphabet) @ counts.T
            total = bits + float(costs.min(axis=0).sum()) + ranges * math.log2(len(bank()))
            if total < best.bits:
                best = Plan(total, _BANK + ranges - 1, splits, costs.argmin(axis=0).tolist())
        total = bits + float(tables[at : at + ranges].sum())
        if total < best.bits:
            best = Plan(total, _TABLE + ranges - 1, splits, [_levels(row) for row in counts])
        at += ranges
    return best


def write(encoder: Encoder, plan: Plan, symbols: NDArray[np.int64], alphabet: int, derived: int | None = None) -> None:
    """The plan, and the symbols by it."""
    write_uniform(encoder, plan.kind, _KINDS)
    for split in plan.splits:
        write_uniform(encoder, split, alphabet)
    models = []
    for row in plan.rows:
        if isinstance(row, int):
            write_uniform(encoder, row, len(bank()))
            models.append(_bank_model(row, alphabet))
        else:
            _write_levels(encoder, row, alphabet)
            models.append(_table_model(row))
    if not models:
        models.append(uniform(alphabet) if derived is None else _bank_model(derived, alphabet))
    if len(models) == 1:
        encoder.symbols(models[0], symbols)
        return
    before = np.concatenate([[0], symbols[:-1]])
    encoder.mixed(models, np.searchsorted(plan.splits, before, side="right"), symbols)


def read(decoder: Decoder, count: int, alphabet: int, derived: int | None = None) -> list[int]:
    """The symbols, ``count`` of them.

    Raises:
        CodecError: damaged.
    """
    kind = read_uniform(decoder, _KINDS)
    if derived is None and _BANK <= kind < _TABLE:
        raise CodecError("a law of gaps stands where no gaps are")
    if kind == _DERIVED:
        return decoder.symbols(uniform(alphabet) if derived is None else _bank_model(derived, alphabet), count)
    ranges = kind - (_BANK if kind < _TABLE else _TABLE) + 1
    splits = [read_uniform(decoder, alphabet) for _ in range(ranges - 1)]
    if any(high <= low for low, high in pairwise([0, *splits])):
        raise CodecError("the ranges of a model are not in order")
    if kind < _TABLE:
        models = [_bank_model(read_uniform(decoder, len(bank())), alphabet) for _ in range(ranges)]
    else:
        models = [read_table(decoder, alphabet) for _ in range(ranges)]
    if ranges == 1:
        return decoder.symbols(models[0], count)
    bounds = [0, *splits, alphabet]
    after = [model for model, (low, high) in zip(models, pairwise(bounds), strict=True) for _ in range(low, high)]
    return decoder.chain(after, count)


def _divisions(joint: NDArray[np.int64], count: int) -> list[tuple[list[int], NDArray[np.int64]]]:
    """Ways to divide the symbol before into ranges that are about as frequent, with the counts ``[range, symbol]``."""
    below = np.cumsum(joint.sum(axis=1))
    found = []
    for ranges in range(1, 5):
        if count < _LEAST_FOR_TABLE * ranges * ranges:
            break
        splits: list[int] = sorted({*(np.searchsorted(below, below[-1] * np.arange(1, ranges) / ranges) + 1).tolist()})
        if len(splits) == ranges - 1 and (not splits or below[splits[-1] - 1] < below[-1]):
            found.append((splits, np.add.reduceat(joint, [0, *splits], axis=0)))
    return found


def _levels(counts: NDArray[np.int64]) -> list[int]:
    """Per symbol 0 if absent, else 1 + the logarithm of its count in half steps, up to the last one present."""
    end = int(np.flatnonzero(counts)[-1]) + 1
    part = counts[:end]
    levels: list[int] = np.where(part > 0, np.rint(2 * np.log2(np.maximum(part, 1))) + 1, 0).astype(np.int64).tolist()
    return levels


def _table_model(levels: list[int]) -> Model:
    return Model([(128, 181)[level - 1 & 1] << (level - 1 >> 1) if level else 0 for level in levels])


def _delta_model(absent: int) -> Model:
    """Symbol 0: absent; then differences to the last level that was present: 0, 1, -1, 2, -2 ..."""
    weights = [absent]
    weight = 1 << 14
    for _ in range(_MAX_LEVEL):
        weights += [weight, weight * 9 // 10]
        weight = max(64, weight * 5 // 8)
    return Model(weights)


_AFTER = (_delta_model(1 << 15), _delta_model(1 << 12))  # after an absent symbol, after a present one
_AFTER_COSTS = [model.costs for model in _AFTER]
_FIRST_LEVEL = 9


def _steps(levels: list[int]) -> Iterator[tuple[int, int]]:
    """Context and symbol of each entry of a table."""
    last, context = _FIRST_LEVEL, 1
    for level in levels:
        delta = level - last
        yield context, 0 if not level else 2 * delta if delta > 0 else 1 - 2 * delta
        last, context = level or last, int(level > 0)


def _table_costs(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits of a table and of the symbols that it codes, very nearly, for each row; all have a count above 0."""
    row, symbol = counts.nonzero()
    first = np.searchsorted(row, np.arange(len(counts)))
    present = counts[row, symbol]
    logarithms = np.rint(2 * np.log2(present))
    deltas, skipped = logarithms.copy(), symbol.copy()
    deltas[1:] -= logarithms[:-1]
    skipped[1:] -= symbol[:-1] + 1
    deltas[first], skipped[first] = logarithms[first] - (_FIRST_LEVEL - 1), symbol[first]
    steps = np.where(deltas > 0, 2 * deltas, 1 - 2 * deltas).astype(np.int64)
    table = np.where(skipped > 0, _AFTER_COSTS[0][steps] + _AFTER_COSTS[1][0], _AFTER_COSTS[1][steps])
    table += np.maximum(skipped - 1, 0) * _AFTER_COSTS[0][0] - present * logarithms / 2
    weights = np.add.reduceat(np.exp2(logarithms / 2), first)
    costs: NDArray[np.float64] = np.add.reduceat(table, first) + counts.sum(axis=1) * np.log2(weights)
    return costs + math.log2(counts.shape[1])


def write_table(encoder: Encoder, counts: NDArray[np.int64], alphabet: int) -> Model:
    """Writes a table of these counts, ``[alphabet]`` or fewer with one above 0, and gives the model it stands for."""
    levels = _levels(counts)
    _write_levels(encoder, levels, alphabet)
    return _table_model(levels)


def read_table(decoder: Decoder, alphabet: int) -> Model:
    """The inverse; raises CodecError."""
    return _table_model(_read_levels(decoder, alphabet))


def _write_levels(encoder: Encoder, levels: list[int], alphabet: int) -> None:
    write_uniform(encoder, len(levels) - 1, alphabet)
    contexts, symbols = zip(*_steps(levels), strict=True)
    encoder.mixed(_AFTER, list(contexts), list(symbols))


def _read_levels(decoder: Decoder, alphabet: int) -> list[int]:
    levels: list[int] = []
    last, context = _FIRST_LEVEL, 1
    for _ in range(read_uniform(decoder, alphabet) + 1):
        symbol = decoder.symbols(_AFTER[context], 1)[0]
        level = 0
        if symbol:
            level = last = last + (symbol >> 1 if symbol % 2 == 0 else -(symbol >> 1))
            if not 0 < level <= _MAX_LEVEL:
                raise CodecError("a frequency table is out of range")
        levels.append(level)
        context = int(level > 0)
    return levels
