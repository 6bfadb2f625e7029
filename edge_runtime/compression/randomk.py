"""Random-k sparsification: positions that both ends draw from a seed, so that only values travel."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Encoded, Update
from edge_runtime.compression.container import read_varint, varint
from edge_runtime.compression.half import from_half, to_half
from edge_runtime.compression.packing import SEED_MASK, random_words
from edge_runtime.compression.topk import ShareCodec
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Value, Vector

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class RandomK(ShareCodec):
    """``density`` of all values, chosen uniformly by ``Request.seed``.

    Stich et al., "Sparsified SGD with memory", NeurIPS 2018, definition 2.1 (random-k). Devices that are given the
    same seed send the same positions, so their updates can be added before they are decoded.

    Options:
        density: fraction of the values; under a budget as many are sent as fit, whatever the density.
        half: values as float16 with one power of two, else as float32.
        unbiased: values times n/k, which makes the mean right (Konecny et al., "Federated learning: strategies for
            improving communication efficiency", arXiv 1610.05492, section 3, subsampling). Error feedback is on without
            this option and off with it: what is sent is then larger than what was there, and a residual would grow
            without end.

    Payload: u32 seed, a byte (0: float32, 1: float16), varint k, int8 exponent if float16, k values; nothing if k is 0.
    """

    name: ClassVar[str] = "randomk"
    number: ClassVar[int] = 13
    defaults: ClassVar[Mapping[str, Value]] = {"density": 0.01, "half": True, "unbiased": False}

    def uses_feedback(self) -> bool:
        """Not if unbiased."""
        return not self.options["unbiased"]

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """Sparse; keeps to the budget."""
        half = bool(self.options["half"])
        count = math.ceil(float(self.options["density"]) * layout.size)
        if request.budget_bytes is not None and layout.size:
            count = bisect.bisect_right(range(layout.size + 1), request.budget_bytes, key=lambda k: _cost(k, half)) - 1
            if count < 1:
                raise CodecError(f"a budget of {request.budget_bytes} bytes of payload does not pay for one value")
        if not count:
            return Encoded(b"", Update(np.empty(0, np.float32), np.empty(0, np.int64), layout.size), state)
        seed = request.seed & SEED_MASK
        indices = random_positions(seed, count, layout.size)
        chosen = values[indices]
        if self.options["unbiased"]:
            wide = chosen * np.float64(layout.size / count)
            chosen = np.clip(wide, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32)
        payload = seed.to_bytes(4, "little") + bytes([half]) + varint(count)
        if half:
            exponent, halves = to_half(chosen)
            payload += exponent.to_bytes(1, "little", signed=True) + halves.tobytes()
            chosen = from_half(exponent, halves)
        else:
            payload += np.ascontiguousarray(chosen, "<f4").tobytes()
        return Encoded(payload, Update(chosen, indices, layout.size), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Sparse; nothing is allocated before k fits the layout and the payload."""
        if not len(payload):
            return Update(np.empty(0, np.float32), np.empty(0, np.int64), layout.size)
        if len(payload) < 6 or payload[4] > 1:
            raise CodecError("header is cut off, or the values are of an unknown type")
        half = bool(payload[4])
        count, at = read_varint(payload, 5, len(payload), layout.size)
        if count == 0 or len(payload) != _cost(count, half):
            raise CodecError(f"{len(payload)} bytes for {count} values")
        if half:
            exponent = int.from_bytes(payload[at : at + 1], "little", signed=True)
            values = from_half(exponent, np.frombuffer(payload[at + 1 :], "<f2"))
        else:
            values = np.frombuffer(payload[at:], "<f4").astype(np.float32)
        seed = int.from_bytes(payload[:4], "little")
        return Update(values, random_positions(seed, count, layout.size), layout.size)


def random_positions(seed: int, count: int, size: int) -> NDArray[np.int64]:
    """Sorted positions, int64 ``[count]``, below ``size``, each set of them equally likely.

    Those with the smallest of ``size`` random words: integers alone, so the choice is the same on every machine and
    with every version of NumPy.
    """
    if count >= size:
        return np.arange(size, dtype=np.int64)
    words = random_words(seed, size)
    threshold = np.partition(words, count - 1)[count - 1]
    return np.flatnonzero(words <= threshold)[:count].astype(np.int64, copy=False)


def _cost(count: int, half: bool) -> int:
    return 5 + len(varint(count)) + (1 + 2 * count if half else 4 * count)
