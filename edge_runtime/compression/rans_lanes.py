"""rANS for long runs of symbols of one model: many states side by side in NumPy, written to one stream.

Giesen, "Interleaved entropy coders", arXiv 1402.3392, section 3. Integers only, and no division.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.compression.rans import BITS, LOW, MASK, SCALE
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.rans import Model


def lanes_for(count: int) -> int:
    """States that a run of ``count`` symbols is spread over; 4 bytes each."""
    return max(1, min(1024, count // 1024))


def encode_lanes(symbols: NDArray[Any], model: Model) -> bytes:
    """A run of symbols of one model; some nanoseconds each from a million on, and 4 bytes per lane.

    Args:
        symbols: integers ``[n]``, all in the model.
        model: their distribution.
    """
    count = symbols.size
    if model.sole is not None or not count:
        return b""
    lanes = lanes_for(count)
    rows = -(-count // lanes)
    padded = np.full((rows, lanes), model.freqs.index(max(model.freqs)), np.int64)
    padded.reshape(-1)[:count] = symbols
    freq, start = np.array(model.freqs, np.uint64), np.array(model.starts, np.uint64)
    if not freq[padded].all():
        raise CodecError("a symbol is not in its model")
    # x // f == x * ceil(2**44 / f) >> 44 for all x < f << 20, and the product stays below 2**64
    inverse = np.array([-(-(1 << 44) // max(1, freq)) for freq in model.freqs], np.uint64)
    state = np.full(lanes, LOW, np.uint64)
    out: list[NDArray[np.uint16]] = []
    for row in padded[::-1]:
        full = state >= (freq[row] << np.uint64(20))
        out.append(state[full].astype("<u2"))
        state >>= np.where(full, np.uint64(16), np.uint64(0))
        state += (state * inverse[row] >> np.uint64(44)) * (np.uint64(SCALE) - freq[row]) + start[row]
    words = np.concatenate(out[::-1]) if out else np.empty(0, "<u2")
    return state.astype("<u4").tobytes() + words.tobytes()


def decode_lanes(payload: memoryview | bytes, model: Model, count: int) -> NDArray[np.uint16]:
    """The inverse, uint16 ``[count]``.

    Raises:
        CodecError: damaged, cut off, or too long.
    """
    if model.sole is not None or not count:
        if len(payload):
            raise CodecError("the coded stream does not end where it should")
        return np.full(count, model.sole or 0, np.uint16)
    lanes = lanes_for(count)
    if len(payload) < 4 * lanes or len(payload) % 2:
        raise CodecError("the coded stream is cut off")
    state = np.frombuffer(payload[: 4 * lanes], "<u4").astype(np.uint64)
    words = np.frombuffer(payload[4 * lanes :], "<u2").astype(np.uint64)
    symbol_of = np.repeat(np.arange(len(model.freqs), dtype=np.uint16), model.freqs)
    freq = np.array(model.freqs, np.uint64)[symbol_of]
    place = np.arange(SCALE, dtype=np.uint64) - np.array(model.starts, np.uint64)[symbol_of]
    rows = -(-count // lanes)
    slots = np.empty((rows, lanes), np.uint16)
    at = 0
    for row in slots:
        low = (state & np.uint64(MASK)).astype(np.int64)
        row[:] = low
        state = freq.take(low) * (state >> np.uint64(BITS)) + place.take(low)
        empty = np.flatnonzero(state < LOW)
        if at + empty.size > words.size:
            raise CodecError("the coded stream is cut off")
        state[empty] = state[empty] << np.uint64(16) | words[at : at + empty.size]
        at += empty.size
    if at != words.size or (state != LOW).any():
        raise CodecError("the coded stream does not end where it should")
    return symbol_of[slots.reshape(-1)[:count]]
