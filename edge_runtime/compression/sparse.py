"""Sparse updates: the largest entries, a codebook for their values, everything entropy-coded in one stream.

Top-k sparsification (Aji and Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017) over the
whole vector, trained quantisation of what is left (Han et al., "Deep compression", ICLR 2016, section 3), positions as
in :mod:`edge_runtime.compression.positions`. The value before is the context of a value: entries of one unit share
their sign and magnitude.

Under a budget, the number of entries and the size of the codebook are those of the least squared error. The stream:
size of the codebook, codebook, positions, values; nothing at all for an update of zeros.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from edge_runtime.compression import positions, sequences
from edge_runtime.compression.base import Codec, Encoded, Update, Value
from edge_runtime.compression.codebook import MAX_LEVELS, Codebook, KMeans
from edge_runtime.compression.rans import Decoder, Encoder
from edge_runtime.compression.ratio import allowed_bytes
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector

_AUTO_LEVELS = (2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 20, 28, 40, 64)
_FEW_LEVELS = 15  # more pay only where there is half a bit per element of the vector, or all its entries fit
_DENSITY_LEVELS = 15
_USED = 0.985  # of the budget: the search stops there
_TRIALS = 8
_SLACK_BITS = 8  # the coder's own loss
_CONTEXT_GAIN = 0.9  # of the values' entropy is left once the value before is known


class Sparse(Codec):
    """Top-k with a k-means codebook and rANS.

    Options: ``density`` above 0 fixes the share of entries that is sent, and no budget is then heeded; ``levels`` the
    size of the codebook (0: chosen); ``target_ratio`` the raw bytes through those of the container (0: the budget's, or
    32 without one).
    """

    name: ClassVar[str] = "sparse"
    number: ClassVar[int] = 5
    keeps_budget: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Value]] = {"density": 0.0, "levels": 0, "target_ratio": 0.0}

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options; raises CodecError."""
        super().__init__(options)
        self._density = float(self.options["density"])
        self._levels = int(self.options["levels"])
        self._ratio = float(self.options["target_ratio"])
        if not 0 <= self._density <= 1:
            raise CodecError(f"codec 'sparse': density {self._density:g} must be from 0 to 1")
        if not 0 <= self._levels <= MAX_LEVELS:
            raise CodecError(f"codec 'sparse': levels {self._levels} must be from 0 to {MAX_LEVELS}")
        if self._ratio < 0:
            raise CodecError(f"codec 'sparse': target_ratio {self._ratio:g} must not be negative")

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """The payload; raises CodecError if the budget does not hold a single entry."""
        if self._density:
            draft = with_density(values, layout, self._density, self._levels)
        else:
            draft = within(values, layout, allowed_bytes(values.size, self._ratio, request), self._levels)
        return Encoded(draft.write(), draft.update(), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """The sparse update; raises CodecError."""
        return decode(payload, layout)


class Largest:
    """The entries of the largest magnitude; zeros are none, and of equal ones the first in the vector comes first.

    Args:
        vector: float32 ``[n]``.
        count: how many will be asked for at most.
    """

    def __init__(self, vector: Vector, count: int) -> None:
        count = min(count, positions.most_entries(vector.size))
        pattern = np.ascontiguousarray(vector, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)  # ordered like |x|
        self._indices = np.flatnonzero(pattern >= np.uint32(_threshold(pattern, count)))
        self._pattern = pattern[self._indices]
        self._sorted = np.sort(self._pattern)[::-1][:count]
        self.count = self._sorted.size

    def top(self, count: int) -> NDArray[np.int64]:
        """Indices of the ``count`` largest, ascending, int64."""
        if count <= 0:
            return np.empty(0, np.int64)
        least = self._sorted[count - 1]
        chosen = self._pattern > least
        equal = np.flatnonzero(self._pattern == least)
        chosen[equal[: count - int(chosen.sum())]] = True
        found: NDArray[np.int64] = self._indices[chosen].astype(np.int64)
        return found

    def energy(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Squares of the largest entries, summed, for each of the counts, relative to the largest square."""
        magnitudes = self._sorted.view(np.float32).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(np.square(magnitudes / magnitudes[0]))])
        return sums[counts]


class Draft(NamedTuple):
    """An encoding that is planned, and only needs to be written.

    Attributes:
        size: elements of the vector.
        bits: estimated length.
        indices: int64 ``[k]``, in the order in which they travel.
        symbols: int64 ``[k]``, centroid of each.
    """

    size: int
    bits: float
    indices: NDArray[np.int64]
    symbols: NDArray[np.int64]
    book: Codebook | None
    places: positions.Positions | None
    model: sequences.Plan | None

    @classmethod
    def of(cls, vector: Vector, indices: NDArray[np.int64], layout: Layout, levels: int) -> Draft:
        """The entries at ``indices``, int64 ``[k]`` ascending, with at most ``levels`` different values."""
        if not indices.size:
            return cls(vector.size, 0.0, indices, indices, None, None, None)
        values = vector[indices].astype(np.float64)
        means = KMeans(np.sort(values), levels)
        book = Codebook.of(means.centres(means.partition(levels).bounds))
        places = positions.plan(indices, layout)
        ordered = indices[places.order]
        symbols = book.assign(values[places.order])
        model = sequences.plan(symbols, book.values.size)
        bits = math.log2(MAX_LEVELS + 1) + book.bits(book.values.size) + places.bits + model.bits
        return cls(vector.size, bits, ordered, symbols, book, places, model)

    def write(self) -> bytes:
        """The payload."""
        encoder = Encoder()
        if self.book is not None and self.places is not None and self.model is not None:
            sequences.write_uniform(encoder, self.book.values.size, MAX_LEVELS + 1)
            self.book.write(encoder)
            self.places.write(encoder)
            sequences.write(encoder, self.model, self.symbols, self.book.values.size)
        return encoder.finish()

    def update(self) -> Update:
        """What the payload decodes to."""
        values = np.empty(0, np.float32) if self.book is None else self.book.values[self.symbols]
        return Update(values, self.indices, self.size)


def with_density(vector: Vector, layout: Layout, density: float, levels: int = 0) -> Draft:
    """The draft with this share of the entries, rounded, and at least one; ``levels`` 0: 15 centroids.

    No more than a quarter of a large vector is taken, since from there on a dense code is the better one.
    """
    largest = Largest(vector, max(1, round(density * vector.size)))
    return Draft.of(vector, largest.top(largest.count), layout, levels or _DENSITY_LEVELS)


def within(vector: Vector, layout: Layout, budget_bytes: int, levels: int = 0) -> Draft:
    """The draft of the least squared error whose payload takes at most ``budget_bytes``.

    Args:
        vector: float32 ``[layout.size]``, finite.
        layout: names and shapes.
        budget_bytes: of the payload.
        levels: size of the codebook; 0: chosen.

    Raises:
        CodecError: not even one entry fits.
    """
    room = 8 * max(0, budget_bytes)
    largest = Largest(vector, min(vector.size, max(64, room // (4 if room < vector.size else 1))))
    if not largest.count:
        return Draft.of(vector, largest.top(0), layout, 1)
    count = min(largest.count, max(1, room // 8))
    if not levels:
        levels, chosen = _choose(vector, layout, largest, count, room)
        if not 0.8 < chosen / count < 1.25:  # judged too far away
            levels, chosen = _choose(vector, layout, largest, chosen, room)
        count = chosen
    best: Draft | None = None
    low, high = 0, largest.count + 1  # fits, does not
    for _ in range(_TRIALS):
        draft = Draft.of(vector, largest.top(count), layout, levels)
        if draft.bits <= room - _SLACK_BITS and len(draft.write()) <= budget_bytes:
            best, low = draft, count
            if draft.bits >= _USED * room or high - low <= 1:
                break
        else:
            high = count
        guess = int(count * ((_USED + 1) / 2 * room / draft.bits) ** 1.05)
        count = guess if low < guess < high else (low + high) // 2
        if count <= low:
            break
    if best is None:
        draft = Draft.of(vector, largest.top(1), layout, 1)
        if len(draft.write()) <= budget_bytes:
            return draft
        raise CodecError(f"a budget of {budget_bytes} bytes is below the {len(draft.write())} that one entry needs")
    return best


def least_bytes(vector: Vector, layout: Layout) -> int:
    """Payload of the single largest entry of a vector that is not all zeros."""
    return len(Draft.of(vector, Largest(vector, 1).top(1), layout, 1).write())


def _choose(vector: Vector, layout: Layout, largest: Largest, count: int, room: int) -> tuple[int, int]:
    """Size of the codebook and number of entries, from the rates and errors at ``count`` entries."""
    indices = largest.top(count)
    values = np.sort(vector[indices].astype(np.float64))
    places = positions.plan(indices, layout)
    many = 2 * room > vector.size or room > 12 * largest.count
    choices = [levels for levels in _AUTO_LEVELS if levels <= _FEW_LEVELS or many]
    means = KMeans(values, choices[-1])
    scale = float(np.abs(values).max())
    counts, errors = [], []
    for levels in choices:
        part = means.partition(levels, iterations=3)
        share = np.diff(part.bounds) / count
        bits = places.bits / count - float(share @ np.log2(share)) * _CONTEXT_GAIN
        spare = room - Codebook.bits(share.size) - 3 * share.size
        counts.append(min(largest.count, max(1, int(spare / bits))))
        errors.append(part.sse / (scale * scale) * counts[-1] / count)
    best = int(np.argmin(np.array(errors) - largest.energy(np.array(counts))))
    return choices[best], counts[best]


def decode(payload: memoryview | bytes, layout: Layout) -> Update:
    """What a draft wrote.

    Raises:
        CodecError: damaged, or made for another layout.
    """
    decoder = Decoder(payload)
    levels = sequences.read_uniform(decoder, MAX_LEVELS + 1)
    if not levels:
        decoder.finish()
        return Update(np.empty(0, np.float32), np.empty(0, np.int64), layout.size)
    book = Codebook.read(decoder, levels)
    indices = positions.read(decoder, layout)
    if not indices.size:
        raise CodecError("a codebook without entries")
    symbols = sequences.read(decoder, indices.size, levels)
    decoder.finish()
    return Update(book.values[np.array(symbols, np.int64)], indices, layout.size)


def _threshold(pattern: NDArray[np.uint32], count: int) -> int:
    """A pattern above 0 that at least ``count`` (or all but the zeros) reach, and not many more."""
    coarse = (pattern >> np.uint32(18)).astype(np.intp)
    reached = np.cumsum(np.bincount(coarse, minlength=1 << 13)[::-1])
    bucket = max(0, (1 << 13) - 1 - int(np.searchsorted(reached, count)))
    return max(1, bucket << 18)
