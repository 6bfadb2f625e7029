"""Dense uniform quantisation in a given number of bytes: one step for the whole model, everything entropy-coded.

At equal slopes of rate and distortion all entries have the same step, whatever their variance ("reverse water-filling";
Gish and Pierce, "Asymptotically efficient quantizing", IEEE Trans. Inf. Theory 14/5, 1968), with rounding towards zero
for the zero bin (Sullivan, "Efficient scalar quantization of exponential and Laplacian random variables", IEEE Trans.
Inf. Theory 42/5, 1996). Multiples of the step are split into class, coded with a table per large tensor, sign and low
bits.

Payload: float32 step; varint length and stream of the tables and the small tensors; per large tensor varint length and
lanes; signs and low bits to the end.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression import gaps, sequences
from edge_runtime.compression.bits import pack_fields, unpack_fields
from edge_runtime.compression.container import read_varint, varint
from edge_runtime.compression.rans import Decoder, Encoder
from edge_runtime.compression.rans_lanes import decode_lanes, encode_lanes
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Vector

_LARGE = 1 << 13  # elements from which on a tensor has a table and lanes of its own
_STEP = struct.Struct("<f")
_MOST_MULTIPLE = (1 << 23) - 1
_TRIALS = 16
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_SAMPLE = 1 << 14
_AIM, _ENOUGH = 0.99, 0.97  # share of the budget that is aimed at, and that is enough


class _Runs(NamedTuple):
    """Where the sequences of classes begin and end: first all small tensors as one, then each large one."""

    small: NDArray[np.bool_]
    large: list[tuple[int, int]]


def encode_uniform(values: Vector, layout: Layout, budget_bytes: int) -> tuple[bytes, Vector] | None:
    """The payload of the smallest step that the budget holds, and what it decodes to; None if there is none.

    Args:
        values: finite float32 ``[layout.size]``.
        layout: names and shapes.
        budget_bytes: most bytes of the payload.
    """
    peak = float(np.abs(values).max()) if values.size else 0.0
    if not peak:
        return None
    sample = _sample(values)
    least = _least_step(peak)
    aim = _AIM * 8 * budget_bytes / values.size
    best: tuple[bytes, Vector] | None = None
    low, high = 0.0, min(4 * peak, _FLOAT32_MAX)  # too fine, coarse enough
    step = min(max(least, _step_for(sample, aim, peak)), high)
    for trial in range(_TRIALS):
        step = float(np.float32(step))
        payload, vector = _encode(values, layout, step)
        if len(payload) <= budget_bytes:
            best, high = (payload, vector), step
            if len(payload) >= _ENOUGH * budget_bytes or step <= 1.001 * least:
                break
        else:
            low = step
        rate = _rate(sample, step) * _AIM * budget_bytes / max(1, len(payload))  # the sample's rate is off as much
        guess = max(least, _step_for(sample, rate, peak))
        step = guess if low < guess < high and (best or trial < 4) else max(least, (low or least) ** 0.5 * high**0.5)
        if low and high < 1.0005 * low:
            break
    return best


def expected_error(values: Vector, budget_bytes: int) -> float:
    """The squared error at this budget, judged by a sample; infinite if it holds nothing.

    Args:
        values: finite float32 ``[n]``, n > 0, not all zero.
        budget_bytes: of the payload.
    """
    sample = _sample(values)
    peak = float(np.abs(values).max())
    step = max(_least_step(peak), _step_for(sample, _AIM * 8 * budget_bytes / values.size, peak))
    errors = sample - _multiples(sample, step) * step
    return float(errors @ errors) * values.size / sample.size


def decode_uniform(payload: memoryview, layout: Layout) -> Vector:
    """The update, float32 ``[layout.size]``.

    Raises:
        CodecError: damaged, or made for another layout.
    """
    if len(payload) < _STEP.size:
        raise CodecError("the step is cut off")
    (step,) = _STEP.unpack_from(payload)
    if not math.isfinite(step):
        raise CodecError("the step is not finite")
    length, at = read_varint(payload, _STEP.size, len(payload), len(payload))
    runs = _runs(layout)
    decoder = Decoder(payload[at : at + length])
    at += length
    classes = np.empty(layout.size, np.int64)
    count = int(runs.small.sum())
    if count:
        classes[runs.small] = sequences.read(decoder, count, gaps.CLASSES)
    models = [sequences.read_table(decoder, gaps.CLASSES) for _ in runs.large]
    decoder.finish()
    for (start, end), model in zip(runs.large, models, strict=True):
        length, at = read_varint(payload, at, len(payload), len(payload))
        classes[start:end] = decode_lanes(payload[at : at + length], model, end - start)
        at += length
    base, widths = gaps.class_base(classes)
    if widths.size and widths.max() > 23:
        raise CodecError("a multiple of the step is out of range")
    signed = base > 0
    widths += signed
    if len(payload) - at != (int(widths.sum()) + 7) // 8:
        raise CodecError("signs and low bits are cut off, or too long")
    fields = unpack_fields(payload[at:], widths).astype(np.int64)
    magnitudes = base + (fields >> 1)
    return _scaled(np.where(signed & (fields & 1 > 0), -magnitudes, magnitudes), step)


def _encode(values: Vector, layout: Layout, step: float) -> tuple[bytes, Vector]:
    multiples = _quantise(values, step)
    magnitudes = np.abs(multiples)
    classes, widths = gaps.to_classes(magnitudes)
    runs = _runs(layout)
    encoder = Encoder()
    small = classes[runs.small]
    if small.size:
        sequences.write(encoder, sequences.plan(small, gaps.CLASSES), small, gaps.CLASSES)
    parts: list[bytes] = []
    for start, end in runs.large:
        part = classes[start:end]
        model = sequences.write_table(encoder, np.bincount(part), gaps.CLASSES)
        coded = encode_lanes(part, model)
        parts += [varint(len(coded)), coded]
    stream = encoder.finish()
    signed = magnitudes > 0
    low = magnitudes - gaps.class_base(classes)[0]
    fields = (low << 1 | (multiples < 0))[signed].astype(np.uint64)
    parts = [_STEP.pack(step), varint(len(stream)), stream, *parts, pack_fields(fields, widths[signed] + 1)]
    return b"".join(parts), _scaled(multiples, step)


def _quantise(values: Vector, step: float) -> NDArray[np.int64]:
    magnitudes = _multiples(np.abs(values).astype(np.float64), step)
    return np.where(np.signbit(values), -magnitudes, magnitudes)


def _multiples(magnitudes: NDArray[np.float64], step: float) -> NDArray[np.int64]:
    """Multiples of the step, rounded towards zero the more the coarser the step is."""
    rounding = 0.5 - 0.1 * min(1.0, step / max(4 * float(magnitudes.mean()), step * 1e-3))
    return np.minimum(np.floor(magnitudes / step + rounding), _MOST_MULTIPLE).astype(np.int64)


def _scaled(multiples: NDArray[np.int64], step: float) -> Vector:
    """Products in float64, which are exact, rounded once."""
    vector: Vector = np.clip(multiples * step, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32)
    return vector


def _runs(layout: Layout) -> _Runs:
    small = np.ones(layout.size, np.bool_)
    large = [(start, end) for _, _, start, end in layout.spans() if end - start >= _LARGE]
    for start, end in large:
        small[start:end] = False
    return _Runs(small, large)


def _least_step(peak: float) -> float:
    return max(peak / _MOST_MULTIPLE, 2.0**-149)


def _sample(values: Vector) -> NDArray[np.float64]:
    sampled: NDArray[np.float64] = np.abs(values[:: max(1, values.size // _SAMPLE)]).astype(np.float64)
    return sampled


def _rate(sample: NDArray[np.float64], step: float) -> float:
    """Bits per element of a sample of magnitudes, float64 ``[n]``, at this step."""
    multiples = _multiples(sample, step)
    classes, widths = gaps.to_classes(multiples)
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    bits = float(counts @ np.log2(sample.size / counts)) + float(widths.sum() + (multiples > 0).sum())
    return bits / sample.size


def _step_for(sample: NDArray[np.float64], rate: float, peak: float) -> float:
    """The step at which a sample takes ``rate`` bits per element."""
    low, high = -40.0, 2.0  # logarithms to base 2, relative to the peak
    for _ in range(13):
        middle = (low + high) / 2
        low, high = (middle, high) if _rate(sample, peak * 2.0**middle) > rate else (low, middle)
    return float(peak * 2.0**high)
