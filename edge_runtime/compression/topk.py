"""Top-k sparsification: the largest values as they are, and where they stand."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.compression.container import read_varint, varint
from edge_runtime.compression.packing import pack_positions, positions_limit, unpack_positions
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Value, Vector


class ShareCodec(Codec):
    """Base of codecs that send a share of the entries, by the option ``density``, and keep to a budget."""

    keeps_budget: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options.

        Raises:
            CodecError: the density is not above 0 and at most 1.
        """
        super().__init__(options)
        density = float(self.options["density"])
        if not 0 < density <= 1:
            raise CodecError(f"option 'density' is {density}; it must be above 0 and at most 1")


class TopK(ShareCodec):
    """The ``density`` largest of all values by magnitude, float32, with Rice-coded positions.

    Aji and Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017; with error feedback as Stich
    et al., "Sparsified SGD with memory", NeurIPS 2018. Under a budget as many values are sent as fit, whatever the
    density. Payload: varint k, k float32, positions; nothing if k is 0.
    """

    name: ClassVar[str] = "topk"
    number: ClassVar[int] = 7
    defaults: ClassVar[Mapping[str, Value]] = {"density": 0.01}

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """Sparse; keeps to the budget."""
        indices = select(values, float(self.options["density"]), request.budget_bytes, lambda k: len(varint(k)) + 4 * k)
        chosen = np.ascontiguousarray(values[indices], "<f4")
        update = Update(chosen.astype(np.float32, copy=False), indices, layout.size)
        if not len(indices):
            return Encoded(b"", update, state)
        payload = varint(len(indices)) + chosen.tobytes() + pack_positions(indices, layout.size)
        return Encoded(payload, update, state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Sparse; nothing is allocated before k fits the layout and the payload."""
        if not len(payload):
            return Update(np.empty(0, np.float32), np.empty(0, np.int64), layout.size)
        count, at = read_varint(payload, 0, len(payload), layout.size)
        end = at + 4 * count
        if count == 0 or end > len(payload):
            raise CodecError(f"{len(payload)} bytes do not hold {count} values")
        values = np.frombuffer(payload[at:end], "<f4").astype(np.float32)
        return Update(values, unpack_positions(payload[end:], count, layout.size), layout.size)


def select(
    values: Vector, density: float, budget: int | None, cost: Callable[[int], int], most: int | None = None
) -> NDArray[np.int64]:
    """Positions of the largest values that are not zero: a fraction of all, or as many as the budget pays for.

    Args:
        values: float32 ``[n]``.
        density: of ``n``; at least one is chosen. Not used with a budget.
        budget: bytes of positions and all else.
        cost: bytes of all but the positions, for a number of values; must not fall.
        most: values to send at most; None: all that are not zero.

    Returns:
        int64, sorted.

    Raises:
        CodecError: the budget does not pay for one value.
    """
    size, nonzero = len(values), int(np.count_nonzero(values))
    most = nonzero if most is None else min(most, nonzero)
    if budget is None:
        return largest(values, min(most, math.ceil(density * size)))
    # The bound holds for any positions, so this many fit; most often some more do.
    count = (
        bisect.bisect_right(range(most + 1), budget, key=lambda k: cost(k) + positions_limit(k, size) if k else 0) - 1
    )
    if count < 1 and most:
        raise CodecError(f"a budget of {budget} bytes of payload does not pay for one value")
    indices = largest(values, count)
    for _ in range(4):
        used = cost(count) + len(pack_positions(indices, size))
        count = min(most, count * budget // max(1, used))
        more = largest(values, count) if count > len(indices) else indices
        if len(more) == len(indices) or cost(count) + len(pack_positions(more, size)) > budget:
            break
        indices = more
    return indices


def largest(values: Vector, count: int) -> NDArray[np.int64]:
    """Sorted positions, int64 ``[count]``, of the largest magnitudes; among equals the first."""
    if count == 0:
        return np.empty(0, np.int64)
    magnitudes = np.abs(values)
    threshold = np.partition(magnitudes, len(values) - count)[len(values) - count]
    chosen = magnitudes > threshold
    equal = np.flatnonzero(magnitudes == threshold)
    chosen[equal[: count - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen).astype(np.int64, copy=False)
