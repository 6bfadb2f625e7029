"""Entropy coding by range asymmetric numeral systems (rANS) in integers only: the same bits on every machine.

Duda, "Asymmetric numeral systems", arXiv 1311.2540, section 3; the word-wise renormalisation is that of Giesen,
"Interleaved entropy coders", arXiv 1402.3392, sections 2 and 4. Frequencies have 12 bits, the state 32, words 16.

:class:`Encoder` and :class:`Decoder` are scalar and mix symbols of several models and raw bits in one stream; about
0.1 microseconds a symbol, so they suit up to some hundred thousand; for longer runs of one model there is
:mod:`edge_runtime.compression.rans_lanes`.

The scalar coder starts at state 0 and not at the least normalised one: the decoder knows the number of symbols, and
two bytes are saved. The final state takes as few bytes as hold it.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.compression.bits import pack_fields, unpack_fields
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

BITS = 12
SCALE = 1 << BITS
LOW = 1 << 16
MASK = SCALE - 1


def quantise_freqs(weights: Iterable[int]) -> list[int]:
    """Frequencies with the sum 4096 in proportion to the weights; where a weight is above 0, at least 1.

    Integer arithmetic only, so that both ends agree.

    Raises:
        CodecError: no weight, a negative one, only zeros, or more than 4096 above 0.
    """
    given = [int(weight) for weight in weights]
    total = sum(given)
    present = len(given) - given.count(0)
    if not 0 < present <= SCALE or min(given) < 0:
        raise CodecError("a frequency table is empty, negative or too long")
    spare = SCALE - present
    freqs = [1 + weight * spare // total if weight else 0 for weight in given]
    freqs[freqs.index(max(freqs))] += SCALE - sum(freqs)
    return freqs


class Model:
    """A static distribution of the symbols ``0 .. len(weights) - 1``; a weight of 0 excludes its symbol.

    Args:
        weights: whole numbers, at least one above 0.

    Raises:
        CodecError: see :func:`quantise_freqs`.
    """

    def __init__(self, weights: Iterable[int]) -> None:
        self.freqs = quantise_freqs(weights)
        start = 0
        self.starts = [start := start + freq for freq in [0, *self.freqs[:-1]]]

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """Bits per symbol; infinite for one that is excluded."""
        return np.array([BITS - math.log2(freq) if freq else math.inf for freq in self.freqs])

    @cached_property
    def sole(self) -> int | None:
        """The only symbol, which then costs nothing; None if there are several."""
        return self.freqs.index(SCALE) if SCALE in self.freqs else None

    @cached_property
    def steps(self) -> list[tuple[int, int, int, int] | None]:
        """For the encoder, per symbol: largest state that takes it + 1, frequency, 4096 - frequency, start."""
        pairs = zip(self.freqs, self.starts, strict=True)
        return [(freq << 20, freq, SCALE - freq, start) if freq else None for freq, start in pairs]

    @cached_property
    def slots(self) -> list[tuple[int, int, int]]:
        """For the decoder, ``[4096]``: symbol, frequency, start."""
        slots: list[tuple[int, int, int]] = []
        for symbol, (freq, start) in enumerate(zip(self.freqs, self.starts, strict=True)):
            slots.extend(repeat((symbol, freq, start), freq))
        return slots


class Encoder:
    """Collects symbols and raw bits in the order in which the decoder asks for them."""

    def __init__(self) -> None:
        self._steps: list[Any] = []
        self._parts: list[tuple[list[int], list[Any]]] = [([], self._steps)]

    def symbols(self, model: Model, symbols: ArrayLike) -> None:
        """Symbols (whole numbers, ``[n]``) of one model.

        Raises:
            CodecError: a symbol is not in its model, which may also be found by :meth:`finish`.
        """
        listed = _listed(symbols)
        if model.sole is not None:
            if listed.count(model.sole) != len(listed):
                raise CodecError("a symbol is not in its model")
            return
        self._steps.extend(map(model.steps.__getitem__, listed))

    def mixed(self, models: Sequence[Model], contexts: ArrayLike, symbols: ArrayLike) -> None:
        """Symbols ``[n]``, each of the model that its context (``[n]``, whole numbers) names."""
        steps = [model.steps for model in models]
        pairs = zip(_listed(contexts), _listed(symbols), strict=True)
        self._steps.extend([steps[context][symbol] for context, symbol in pairs])

    def raw(self, value: int, width: int) -> None:
        """The low ``width`` bits of ``value``; any width."""
        for at in range(0, width, 16):
            bits = min(16, width - at)
            self._steps.append((1 << (32 - bits), 1, (1 << bits) - 1, value >> at & ((1 << bits) - 1)))

    def raws(self, values: ArrayLike, widths: ArrayLike) -> None:
        """Many raw fields at a fraction of the time: ``values[i] < 2**widths[i]``, widths up to 56, ``[n]``."""
        words, rest, width = _words(np.asarray(values, np.uint64), np.asarray(widths, np.int64))
        if words:
            self._steps = []
            self._parts.append((words, self._steps))
        self.raw(rest, width)

    def finish(self) -> bytes:
        """The stream; nothing for nothing.

        Raises:
            CodecError: a symbol is not in its model.
        """
        state = 0
        out: list[int] = []
        append = out.append
        try:
            for words, steps in reversed(self._parts):
                for limit, freq, rest, start in reversed(steps):
                    if state >= limit:
                        append(state & 0xFFFF)
                        state >>= 16
                    state += state // freq * rest + start
                left = list(words)
                while left and state < LOW:
                    state = state << 16 | left.pop()
                if left:  # each takes the place of the low half of the state, so a run needs no arithmetic
                    append(state & 0xFFFF)
                    out.extend(left[:0:-1])
                    state = state >> 16 << 16 | left[0]
        except TypeError as error:
            raise CodecError("a symbol is not in its model") from error
        head = state.to_bytes((state.bit_length() + 7) // 8, "little")
        return head + np.array(out[::-1], "<u2").tobytes()


class Decoder:
    """Reads what :class:`Encoder` wrote. Work and memory are bounded by what the caller asks for.

    Args:
        payload: the whole stream.

    Raises:
        CodecError: no stream begins like this.
    """

    def __init__(self, payload: bytes | memoryview) -> None:
        head = len(payload) if len(payload) < 3 else 4 - len(payload) % 2
        self._state = int.from_bytes(payload[:head], "little")
        self._words: list[int] = np.frombuffer(payload[head:], "<u2")[::-1].tolist()  # the next one last
        if (head and not payload[head - 1]) or (self._words and self._state < LOW):
            raise CodecError("the coded stream begins with an impossible state")

    def symbols(self, model: Model, count: int) -> list[int]:
        """The next ``count`` symbols of one model."""
        if model.sole is not None:
            return [model.sole] * count
        slots, state, words = model.slots, self._state, self._words
        pop = words.pop
        out: list[int] = []
        append = out.append
        for _ in repeat(None, count):
            low = state & MASK
            symbol, freq, start = slots[low]
            append(symbol)
            state = freq * (state >> BITS) + low - start
            if state < LOW and words:
                state = state << 16 | pop()
        self._state = state
        return out

    def mixed(self, models: Sequence[Model], contexts: ArrayLike) -> list[int]:
        """One symbol per context (whole numbers, ``[n]``), of the model that it names."""
        tables = [model.slots for model in models]
        state, words = self._state, self._words
        pop = words.pop
        out: list[int] = []
        append = out.append
        for context in _listed(contexts):
            low = state & MASK
            symbol, freq, start = tables[context][low]
            append(symbol)
            state = freq * (state >> BITS) + low - start
            if state < LOW and words:
                state = state << 16 | pop()
        self._state = state
        return out

    def chain(self, models: Sequence[Model], count: int) -> list[int]:
        """The next ``count`` symbols, each of the model that the symbol before it names; before the first is 0."""
        tables = [model.slots for model in models]
        state, words = self._state, self._words
        pop = words.pop
        out: list[int] = []
        append = out.append
        symbol = 0
        for _ in repeat(None, count):
            low = state & MASK
            symbol, freq, start = tables[symbol][low]
            append(symbol)
            state = freq * (state >> BITS) + low - start
            if state < LOW and words:
                state = state << 16 | pop()
        self._state = state
        return out

    def raw(self, width: int) -> int:
        """The next ``width`` bits."""
        value = 0
        for at in range(0, width, 16):
            bits = min(16, width - at)
            value |= (self._state & ((1 << bits) - 1)) << at
            self._state >>= bits
            if self._state < LOW and self._words:
                self._state = self._state << 16 | self._words.pop()
        return value

    def raws(self, widths: ArrayLike) -> NDArray[np.uint64]:
        """Raw fields of these widths (whole numbers up to 56, ``[n]``), uint64 ``[n]``."""
        fields = np.asarray(widths, np.int64)
        total = int(fields.sum())
        count = total // 16
        taken: list[int] = []
        if count:
            run = min(count, len(self._words))
            if run:
                taken = [self._state & 0xFFFF, *self._words[: -run - 1 : -1]]
                self._state = self._state >> 16 << 16 | taken.pop()
                del self._words[-run:]
            taken += [self.raw(16) for _ in range(count - run)]
        taken.append(self.raw(total - 16 * count))
        return unpack_fields(np.array(taken, "<u2").tobytes(), fields)

    def finish(self) -> None:
        """Raises CodecError unless the stream ends exactly here."""
        if self._state or self._words:
            raise CodecError("the coded stream does not end where it should")


def _listed(numbers: ArrayLike) -> list[int]:
    if isinstance(numbers, list):
        return numbers
    listed: list[int] = np.asarray(numbers).tolist()
    return listed


def _words(values: NDArray[np.uint64], widths: NDArray[np.int64]) -> tuple[list[int], int, int]:
    """Fields laid end to end: 16-bit words, the bits that fill none, and their number."""
    total = int(widths.sum())
    packed = pack_fields(values, widths)
    words: list[int] = np.frombuffer(packed + bytes(2 + len(packed) % 2), "<u2").tolist()
    return words[: total // 16], words[total // 16], total % 16
