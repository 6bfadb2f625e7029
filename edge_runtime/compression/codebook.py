"""Codebooks for scalar quantisation: one-dimensional k-means, and its centroids in few bits.

On sorted values the clusters are intervals, so the best partition is found by dynamic programming (Wu, "Optimal
quantization by matrix searching", J. Algorithms 12, 1991; Wang and Song, "Ckmeans.1d.dp", R Journal 3/2, 2011). Here
it runs on groups of neighbours, and Lloyd's iteration on the values themselves follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Vector
    from edge_runtime.compression.rans import Decoder, Encoder

MAX_LEVELS = 64
_GROUPS = 128
_ITERATIONS = 30
_EXPONENT_BIAS = 82
_EXPONENT_BITS = 8
_LARGEST_HALF = 0x7BFF


class Partition(NamedTuple):
    """Clusters of sorted values: ``bounds`` int64 ``[K + 1]`` from 0 to n, none empty; ``sse`` the squared error."""

    bounds: NDArray[np.int64]
    sse: float


class KMeans:
    """Best partitions of a set of numbers, for all numbers of clusters from one table.

    Args:
        values: ascending, float64 ``[n]``, finite.
        most: largest number of clusters that will be asked for.
    """

    def __init__(self, values: NDArray[np.float64], most: int) -> None:
        scale = float(max(abs(values[0]), abs(values[-1]))) if values.size else 0.0
        self._values = values
        scaled = values / scale if scale else values  # squares of denormals and of 3e38 stay in range
        self._scale = scale
        self._sums = np.concatenate([[0.0], np.cumsum(scaled)])
        self._squares = np.concatenate([[0.0], np.cumsum(np.square(scaled))])
        edges = self._groups(scaled)
        self._edges = edges
        n, s, q = edges.astype(np.float64), self._sums[edges], self._squares[edges]
        count, total = n[None, :] - n[:, None], s[None, :] - s[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = (q[None, :] - q[:, None]) - np.where(count > 0, total * total / count, 0.0)
        cost = np.where(count > 0, np.maximum(cost, 0.0), np.inf)
        self._back: list[NDArray[np.int64]] = []
        best = cost[0]
        for _ in range(1, min(most, len(edges) - 1)):
            candidates = best[:, None] + cost
            choice = candidates.argmin(axis=0)
            best = candidates[choice, np.arange(len(edges))]
            self._back.append(choice)

    @staticmethod
    def _groups(scaled: NDArray[np.float64]) -> NDArray[np.int64]:
        """Bounds of the groups: half equal in number, half with as much of the cube root of the density each.

        That is the density of an optimal quantiser's centroids (Panter and Dite, Proc. IRE 39/1, 1951).
        """
        n = scaled.size
        if n <= _GROUPS:
            return np.unique(np.concatenate([[0, n], np.flatnonzero(np.diff(scaled)) + 1]))
        ranks = np.arange(0, n, max(1, n // (_GROUPS // 2)))
        spread = np.cumsum(np.cbrt(np.diff(scaled)) ** 2)
        equal = np.searchsorted(spread, np.linspace(0, spread[-1], _GROUPS // 2)) + 1
        return np.unique(np.concatenate([[0, n], np.searchsorted(scaled, scaled[ranks]), np.minimum(equal, n)]))

    def partition(self, clusters: int, iterations: int = _ITERATIONS) -> Partition:
        """The best partition into at most ``clusters`` intervals; fewer if there are fewer different values.

        Args:
            clusters: up to ``most``.
            iterations: of Lloyd's algorithm after the dynamic programming.
        """
        at = len(self._edges) - 1
        path = [at]
        for back in reversed(self._back[: min(clusters, len(self._edges) - 1) - 1]):
            at = int(back[at])
            path.append(at)
        bounds = self._edges[[0, *path[::-1]]]
        best = self._scored(bounds)
        scaled = self._values / self._scale if self._scale else self._values
        for _ in range(iterations):
            centres = np.diff(self._sums[best.bounds]) / np.diff(best.bounds)
            inner = np.searchsorted(scaled, (centres[1:] + centres[:-1]) / 2)
            moved = np.unique(np.concatenate([[0], inner, [self._values.size]]))
            if moved.size != best.bounds.size or (moved == best.bounds).all():
                break
            scored = self._scored(moved)
            if not scored.sse < best.sse:
                break
            best = scored
        return Partition(best.bounds, best.sse * self._scale * self._scale)

    def centres(self, bounds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Means of the clusters, ``[K]``."""
        means: NDArray[np.float64] = np.diff(self._sums[bounds]) / np.diff(bounds) * (self._scale or 1.0)
        return means

    def _scored(self, bounds: NDArray[np.int64]) -> Partition:
        sums, squares, counts = (
            np.diff(table[bounds]) for table in (self._sums, self._squares, np.arange(self._sums.size))
        )
        return Partition(bounds, float(np.maximum(squares - sums * sums / counts, 0).sum()))


class Codebook:
    """Centroids as they travel: float16 relative to a power of four, cut to 5 bits of mantissa up to 16 centroids.

    Attributes:
        values: float32 ``[K]``, ascending.
    """

    def __init__(self, exponent: int, codes: NDArray[np.int64], drop: int) -> None:
        """Takes the biased exponent, and float16 patterns without their ``drop`` low bits, negative for minus.

        Raises:
            CodecError: not ascending, or not finite.
        """
        if (np.diff(codes) <= 0).any():
            raise CodecError("the codebook is not in order")
        magnitudes = np.abs(codes) << drop
        if (magnitudes > _LARGEST_HALF).any():
            raise CodecError("the codebook is not finite")
        halves = magnitudes.astype("<u2").view("<f2").astype(np.float64) * np.sign(codes)
        wide = halves * 4.0 ** (exponent - _EXPONENT_BIAS)
        if wide.size and np.abs(wide).max() > np.finfo(np.float32).max:
            raise CodecError("the codebook is not finite")
        self.values: Vector = wide.astype(np.float32)
        self._exponent, self._codes, self._drop = exponent, codes, drop

    @classmethod
    def of(cls, centres: NDArray[np.float64]) -> Codebook:
        """The nearest codebook, fewer values where some would be alike; centres float64 ``[K]``, 0 < K <= 64."""
        largest = float(np.abs(centres).max())
        exponent = max(0, (int(np.frexp(largest)[1]) - 14 >> 1) + _EXPONENT_BIAS) if largest else 0
        drop = _dropped_bits(centres.size)
        halves = (np.abs(centres) * 4.0 ** (_EXPONENT_BIAS - exponent)).astype("<f2").view("<u2").astype(np.int64)
        limit = int(_float_max_code(exponent)) >> drop
        codes = np.minimum(halves + (1 << drop >> 1) >> drop, limit)
        return cls(exponent, np.unique(np.where(centres < 0, -codes, codes)), drop)

    def assign(self, values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """The nearest centroid of each value, int64 ``[n]``."""
        wide = self.values.astype(np.float64)
        return np.searchsorted((wide[1:] + wide[:-1]) / 2, values).astype(np.int64)

    @staticmethod
    def bits(levels: int) -> int:
        """Bits of a codebook of this size, without the size itself."""
        return _EXPONENT_BITS + levels * (16 - _dropped_bits(levels)) if levels else 0

    def write(self, encoder: Encoder) -> None:
        """All but the number of centroids."""
        encoder.raw(self._exponent, _EXPONENT_BITS)
        fields = np.abs(self._codes) << 1 | (self._codes < 0)
        encoder.raws(fields, np.full(fields.size, 16 - self._drop))

    @classmethod
    def read(cls, decoder: Decoder, levels: int) -> Codebook:
        """The inverse; raises CodecError."""
        exponent = decoder.raw(_EXPONENT_BITS)
        drop = _dropped_bits(levels)
        fields = decoder.raws(np.full(levels, 16 - drop)).astype(np.int64)
        codes = fields >> 1
        return cls(exponent, np.where(fields & 1, -codes, codes), drop)


def _dropped_bits(levels: int) -> int:
    return 5 if levels <= 16 else 0


def _float_max_code(exponent: int) -> int:
    """The float16 pattern that times ``4**exponent`` is the largest within float32."""
    room = float(np.finfo(np.float32).max) / 4.0 ** (exponent - _EXPONENT_BIAS)
    return int(np.nextafter(np.float16(min(room, 65504.0)), np.float16(0)).view(np.uint16)) if room < 65504 else 0x7BFF
