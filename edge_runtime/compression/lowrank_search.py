"""The sender's side of the low-rank codec: factors, their quantisation, and the step that uses up the bytes."""

from __future__ import annotations

import math
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.lowrank_coefficients import LIMIT, best_tables
from edge_runtime.compression.lowrank_factors import Coded, Factored, code, components, left_factor, quantise
from edge_runtime.compression.lowrank_format import (
    EXPONENT_BITS,
    MANTISSA_BITS,
    PAIR_RANK_BITS,
    PAIR_SHIFT_BITS,
    RANK_BITS,
    CodedPair,
    Content,
    split_outputs,
)
from edge_runtime.compression.lowrank_pair import BUCKETS, LEVEL_BITS
from edge_runtime.compression.lowrank_pair_fit import fit_pair
from edge_runtime.compression.lowrank_parts import parts
from edge_runtime.compression.lowrank_product import PAIR_GAIN_BITS, pair_gain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Vector
    from edge_runtime.compression.lowrank_pair import Integers
    from edge_runtime.compression.lowrank_pair_fit import FittedPair

    Array = NDArray[np.float32]
    Weights = list[tuple[Integers, Integers]]

PRICE = 0.12  # squared steps a bit must save: 2 ln 2 / 12 at high rate
_STEP = (0.0055, 4120.0, 0.7)  # first guess: relative to the norm at that many bytes, and the power of the bytes
_BITS_PER_ROW = 1.2  # of a component that pays, about
_TRIALS, _REFINEMENTS = 6, 5
_SLOPE = 2.2  # bits grow with this power of 1 / step, about
_EXCESS, _MOST = 1.7, 2.0  # bits of all that pays, relative to those there are: aim and most
_LARGE = 0.2  # share of all bits from which a component may be worth a larger step
_AIM, _WINDOW = 0.997, 0.993  # share of the bits that is aimed at, and that ends the search
_PAIR_SAVES = 2.0  # squared error a pair must save, relative to the price of its bits


class _Problem(NamedTuple):
    """What there is to code, and the step below which coefficients would pass their limit."""

    factored: list[Factored]
    chunks: list[Array]
    least_step: float


class _Chunks(NamedTuple):
    """Quantised chunks with their tables, bits and squared error saved."""

    numbers: list[Array]
    tables: list[int]
    bits: NDArray[np.float64]
    saved: NDArray[np.float64]


class _Trial(NamedTuple):
    """All that could be sent with one step: bits and saved squared errors of components and chunks, end to end."""

    step: float
    matrices: list[Coded]
    chunks: _Chunks
    bits: NDArray[np.float64]
    saved: NDArray[np.float64]

    def spends(self, chosen: NDArray[np.bool_]) -> float:
        return float(self.bits[chosen & (self.saved > 0)].sum())


def search(values: Vector, layout: Layout, budget_bits: float, weights: Weights) -> Content | None:
    """The content that spends ``budget_bits`` best, or None if nothing fits.

    Args:
        values: finite, of magnitude about 1, not all 0.
        layout: names and shapes.
        budget_bits: most bits of the payload, about.
        weights: what both ends know of each pair of layers; nothing: no pairs.
    """
    norm = math.sqrt(float(np.dot(values, values)))
    share, at, power = _STEP
    step = norm * share * (8 * at / max(budget_bits, 8.0)) ** power
    found = _search(values, layout, budget_bits, weights, step)
    if found is not None and any(found[0].pairs) and not 2 / 3 < found[0].step / step < 1.5:
        again = _search(values, layout, budget_bits, weights, found[0].step)
        found = found if again is None else max(found, again, key=lambda result: result[1])
    return None if found is None else found[0]


def _search(
    values: Vector, layout: Layout, budget_bits: float, weights: Weights, step: float
) -> tuple[Content, float] | None:
    """The content for pairs coded with this step, and the squared error that it saves."""
    plan = parts(layout)
    rests = [matrix.take(values) for matrix in plan.matrices]
    pairs: list[tuple[FittedPair, tuple[int, ...]] | None] = []
    saved = -sum(float(np.vdot(rest, rest)) for rest in rests)
    bits = 1.0 + EXPONENT_BITS + MANTISSA_BITS + RANK_BITS * len(rests) + len(plan.chunks)
    for index, known in zip(plan.pairs, weights or repeat(None), strict=False):
        pair, spent = (None, 0.0) if known is None else _pair(rests, index, known, step)
        pairs.append(pair)
        bits += spent + PAIR_RANK_BITS
    saved += sum(float(np.vdot(rest, rest)) for rest in rests)
    ranks = [min(m.rank, 4 + int(budget_bits / (_BITS_PER_ROW * (m.rows + m.width)))) for m in plan.matrices]
    factored = [Factored(rest, left_factor(rest, rank)) for rest, rank in zip(rests, ranks, strict=True)]
    chunks = [values[start : start + size] * np.float32(weight) for start, size, weight in plan.chunks]
    if budget_bits <= bits:
        return None
    peaks = [float(np.linalg.norm(matrix.left[0])) for matrix in factored if matrix.left.size]
    peaks += [float(np.abs(chunk).max()) for chunk in chunks]
    problem = _Problem(factored, chunks, max(peaks) / LIMIT)
    best, chosen = _fill(problem, budget_bits - bits, step)
    if not chosen.any() and not any(pairs):
        return None
    coded_pairs = [None if pair is None else _with_gains(*pair, best.step) for pair in pairs]
    if any(pair is not None and coded is None for pair, coded in zip(pairs, coded_pairs, strict=True)):
        return _search(values, layout, budget_bits, [], step)  # a gain that the format does not hold
    sent = []
    start = 0
    for coded in best.matrices:
        end = start + len(coded.bits)
        sent.append(components(coded, np.flatnonzero(chosen[start:end]), best.step))
        start = end
    rest = zip(chosen[start:].tolist(), best.chunks.numbers, best.chunks.tables, strict=True)
    listed = [(numbers.astype(np.float64), table) if used else None for used, numbers, table in rest]
    return Content(best.step, coded_pairs, sent, listed), float(best.saved[chosen].sum()) - saved


def _pair(
    rests: list[Array], index: int, weights: tuple[Integers, Integers], step: float
) -> tuple[tuple[FittedPair, tuple[int, ...]] | None, float]:
    """Code of a pair, its tables, its bits; takes what it predicts out of ``rests``. None and 0 if it does not pay."""
    price = PRICE * step * step
    both = rests[index : index + 2]
    fitted = fit_pair(both[0], both[1], weights, step, price)
    if fitted is None:
        return None, 0.0
    tables, bits = _pair_tables(fitted)
    left_over = [
        _without(rest, left, right, gain)
        for rest, (left, right), gain in zip(both, fitted.factors, fitted.gains, strict=True)
    ]
    saved = sum(float(np.vdot(rest, rest)) for rest in both) - sum(float(np.vdot(rest, rest)) for rest in left_over)
    if saved < _PAIR_SAVES * price * bits:
        return None, 0.0
    rests[index : index + 2] = left_over
    return (fitted, tables), bits


def _without(rest: Array, left: Integers, right: Integers, gain: float) -> Array:
    out: Array = (left * gain).astype(np.float32) @ right.T.astype(np.float32)
    np.subtract(rest, out, out=out)
    return out


def _with_gains(fitted: FittedPair, tables: tuple[int, ...], step: float) -> CodedPair | None:
    first, second = (pair_gain(gain, step) for gain in fitted.gains)
    return None if first is None or second is None else CodedPair(fitted.code, tables, (first, second))


def _pair_tables(fitted: FittedPair) -> tuple[tuple[int, ...], float]:
    """Tables of the code's vectors, and bits of the code."""
    code = fitted.code
    vectors = [*code.inputs.T, code.errors.reshape(-1), *split_outputs(code.outputs)]
    costs = [best_tables(vector[None].astype(np.float32)) for vector in vectors]
    bits = sum(float(cost[0]) for cost, _ in costs)
    bits += LEVEL_BITS * BUCKETS + 2 * (PAIR_GAIN_BITS + PAIR_SHIFT_BITS)
    return tuple(int(table[0]) for _, table in costs), bits


def _fill(problem: _Problem, target: float, step: float) -> tuple[_Trial, NDArray[np.bool_]]:
    """The trial that uses up the bits, and what of it to send.

    First a step at which somewhat more pays than fits, then the best of that, then the step for just these bits.
    """
    first = _more_than_fits(problem, target, step)
    found = []
    for chosen in _choices(first, target):
        trial = _refine(problem, target, first, chosen)
        used = chosen & (trial.saved > 0)
        if trial.spends(used) <= target:
            found.append((float(trial.saved[used].sum()), trial, used))
    if not found:
        return first, np.zeros(first.bits.size, np.bool_)
    _, trial, used = max(found, key=lambda entry: entry[0])
    return trial, used


def _refine(problem: _Problem, target: float, trial: _Trial, chosen: NDArray[np.bool_]) -> _Trial:
    """The trial whose step makes the chosen components use up the bits, or the last one that was tried."""
    over: tuple[float, float] | None = None
    under: tuple[float, float] | None = None
    best: _Trial | None = None
    slope = _SLOPE
    aim = math.log(_AIM * target)
    for _ in range(_REFINEMENTS):
        used = trial.spends(chosen)
        point = (math.log(trial.step), math.log(max(used, 1.0)))
        before = under if used <= target else over
        if before is not None and point[0] != before[0]:
            slope = min(max((point[1] - before[1]) / (before[0] - point[0]), 0.3), 4.0)
        if used <= target:
            under = point
            best = trial
            if used >= _WINDOW * target or not used:
                break
        else:
            over = point
        at = point[0] + (point[1] - aim) / slope
        if over is not None and under is not None:
            share = (aim - under[1]) / (over[1] - under[1])
            at = under[0] + (over[0] - under[0]) * min(max(share, 0.08), 0.92)
        trial = _try(problem, math.exp(min(max(at, point[0] - 2.0), point[0] + 2.0)))
    else:
        if trial.spends(chosen) <= target and (best is None or trial.step < best.step):
            best = trial
    return best or trial


def _more_than_fits(problem: _Problem, target: float, step: float) -> _Trial:
    """A trial in which what pays needs a little more than the bits there are."""
    over: _Trial | None = None
    ends = [0.0, math.inf]  # steps that need too many bits and too few
    for _ in range(_TRIALS):
        trial = _try(problem, step)
        bits = trial.spends(_pays(trial))
        if bits >= target:
            over = trial
            ends[0] = max(ends[0], step)
            if bits <= _MOST * target:
                break
        else:
            ends[1] = min(ends[1], step)
        step *= (max(bits, 0.05 * target) / (_EXCESS * max(target, 1.0))) ** (1 / _SLOPE)
        if not ends[0] < step < ends[1]:
            step = math.sqrt(ends[0] * ends[1])
    return over or trial


def _pays(trial: _Trial) -> NDArray[np.bool_]:
    return trial.saved > PRICE * trial.step**2 * trial.bits


def _choices(trial: _Trial, target: float) -> list[NDArray[np.bool_]]:
    """What saves most squared error per bit, as far as the bits go; a second choice has the first that did not fit."""
    chosen = np.zeros(trial.bits.size, np.bool_)
    choices = [chosen]
    left = target
    for index in np.argsort(-trial.saved / trial.bits, kind="stable").tolist():
        if trial.saved[index] <= 0:
            break
        if trial.bits[index] <= left:
            chosen[index] = True
            left -= float(trial.bits[index])
        elif len(choices) == 1 and trial.bits[index] > _LARGE * target:
            choices.append(chosen.copy())
            choices[1][index] = True
    return choices


def _try(problem: _Problem, step: float) -> _Trial:
    step = max(step, problem.least_step)
    matrices = [code(matrix, step) for matrix in problem.factored]
    coded = _code_chunks(problem.chunks, step)
    bits = np.concatenate([*(matrix.bits for matrix in matrices), coded.bits])
    return _Trial(step, matrices, coded, bits, np.concatenate([*(matrix.saved for matrix in matrices), coded.saved]))


def _code_chunks(chunks: list[Array], step: float) -> _Chunks:
    out = _Chunks([], [], np.ones(len(chunks)), np.zeros(len(chunks)))
    for index, chunk in enumerate(chunks):
        numbers = quantise(chunk[None], step)[0]
        out.numbers.append(numbers)
        out.tables.append(0)
        if numbers.any():
            bits, tables = best_tables(numbers[None])
            out.tables[-1], out.bits[index] = int(tables[0]), bits[0]
            out.saved[index] = step * float(np.dot(numbers, 2 * chunk - np.float32(step) * numbers))
    return out
