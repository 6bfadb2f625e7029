"""Stochastic uniform quantisation to 8 or 4 bits, unbiased and entropy coded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.compression.packing import random_words
from edge_runtime.compression.symbols import pack_symbols, unpack_symbols
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_LEAST = 2.0**-149


class Quantised(Codec):
    """Whole multiples of a step per bucket, each value rounded up or down by chance so that its mean is kept.

    Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and encoding", NeurIPS 2017, section
    3.1, with buckets and the largest magnitude in place of the L2 norm as the scale, as in their experiments, and
    integer rANS or Zstandard, whichever is smaller, in place of Elias codes. Unbiased, so error feedback is off unless
    asked for. Chance comes from ``Request.seed`` alone.

    Payload: float32 step per bucket; then a byte for the coder with its bytes, unless there are no elements. rANS has
    one table for all tensors, a byte per symbol.

    Attributes:
        levels: steps from zero to the largest value.
        bucket: most elements of one tensor that share a step; 0: the whole tensor.
    """

    feedback: ClassVar[bool] = False
    levels: ClassVar[int]
    bucket: ClassVar[int] = 0

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """Dense; the budget is not kept to."""
        buckets = self._buckets(layout)
        steps = np.zeros(len(buckets), "<f4")
        symbols = np.empty(layout.size, np.uint8)
        dice = random_words(request.seed, -(-layout.size // 2)).astype("<u8", copy=False).view("<u4")
        for at, (start, end) in enumerate(buckets):
            steps[at], symbols[start:end] = self._quantise(values[start:end], dice[start:end])
        payload = steps.tobytes() + pack_symbols(symbols, 2 * self.levels + 1)
        return Encoded(payload, Update(self._rebuild(steps, symbols, buckets)), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Dense."""
        buckets = self._buckets(layout)
        end = 4 * len(buckets)
        if len(payload) < end + (layout.size > 0):
            raise CodecError(f"{len(payload)} bytes do not hold {len(buckets)} steps")
        symbols = unpack_symbols(payload[end:], 2 * self.levels + 1, layout.size)
        return Update(self._rebuild(np.frombuffer(payload[:end], "<f4"), symbols, buckets))

    def _buckets(self, layout: Layout) -> list[tuple[int, int]]:
        """First element and end of each, in order; none for a tensor without elements."""
        spans = [(start, end) for _, _, start, end in layout.spans() if end > start]
        most = self.bucket or max(1, layout.size)
        return [(first, min(end, first + most)) for start, end in spans for first in range(start, end, most)]

    def _quantise(self, values: Vector, dice: NDArray[np.uint32]) -> tuple[float, NDArray[np.uint8]]:
        """The step, and symbols from 0 (the most negative) to twice the levels."""
        peak = float(max(values.max(), -values.min()))
        if peak == 0:
            return 0.0, np.full(values.shape, self.levels, np.uint8)
        step = self._step(peak)
        chance = (dice >> np.uint32(8)).astype(np.float32)
        chance *= np.float32(2.0**-24)
        chance += values / np.float32(step)
        np.floor(chance, out=chance)
        np.clip(chance, -self.levels, self.levels, out=chance)  # the last bit of the division may go beyond
        chance += self.levels
        return step, chance.astype(np.uint8)

    def _step(self, peak: float) -> float:
        exact = peak / self.levels
        if exact < 2.0**-126:  # upwards among the subnormals, which are far apart
            return math.ceil(exact / _FLOAT32_LEAST) * _FLOAT32_LEAST
        step = np.float32(exact)
        return float(step if self.levels * float(step) <= _FLOAT32_MAX else np.nextafter(step, np.float32(0)))

    def _rebuild(
        self, steps: NDArray[np.float32], symbols: NDArray[np.uint8], buckets: list[tuple[int, int]]
    ) -> Vector:
        vector = symbols.astype(np.float32)
        vector -= self.levels
        with np.errstate(over="ignore", invalid="ignore"):
            for step, (start, end) in zip(steps.astype(np.float32), buckets, strict=True):
                vector[start:end] *= step
        return vector


class Int8(Quantised):
    """127 steps on either side of zero, one step per tensor."""

    name: ClassVar[str] = "int8"
    number: ClassVar[int] = 8
    levels: ClassVar[int] = 127


class Int4(Quantised):
    """7 steps on either side of zero, one step per 2048 elements: so few levels suffer from a single large value."""

    name: ClassVar[str] = "int4"
    number: ClassVar[int] = 9
    levels: ClassVar[int] = 7
    bucket: ClassVar[int] = 2048
