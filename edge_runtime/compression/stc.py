"""Sparse ternary compression: the largest values, all with one magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Encoded, Update
from edge_runtime.compression.container import read_varint, varint
from edge_runtime.compression.packing import pack_bits, pack_positions, unpack_bits, unpack_positions
from edge_runtime.compression.topk import ShareCodec, select
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Value, Vector


class Stc(ShareCodec):
    """Signs of the ``density`` largest values, their mean magnitude, and Golomb-coded positions.

    Sattler et al., "Robust and communication-efficient federated learning from non-IID data", IEEE TNNLS 2019,
    algorithms 1 (compression) and 3 (positions); the density of 1/400 is theirs. Their Golomb parameter is a power of
    two computed from the density, here it is the best one for the positions at hand. Under a budget as many values are
    sent as fit, but no more than a single magnitude serves.
    Payload: varint k, float32 magnitude, k sign bits, positions; nothing if k is 0.
    """

    name: ClassVar[str] = "stc"
    number: ClassVar[int] = 11
    defaults: ClassVar[Mapping[str, Value]] = {"density": 0.0025}

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """Sparse; keeps to the budget."""
        most = None if request.budget_bytes is None else _best_count(values)
        indices = select(values, float(self.options["density"]), request.budget_bytes, _cost, most)
        if not len(indices):
            return Encoded(b"", Update(np.empty(0, np.float32), indices, layout.size), state)
        chosen = values[indices]
        magnitude = np.abs(chosen).mean(dtype=np.float64).astype(np.float32)
        negative = (chosen < 0).astype(np.uint8)
        payload = varint(len(indices)) + magnitude.astype("<f4").tobytes() + pack_bits(negative)
        payload += pack_positions(indices, layout.size)
        return Encoded(payload, Update(_rebuild(magnitude, negative), indices, layout.size), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Sparse; nothing is allocated before k fits the layout and the payload."""
        if not len(payload):
            return Update(np.empty(0, np.float32), np.empty(0, np.int64), layout.size)
        count, at = read_varint(payload, 0, len(payload), layout.size)
        signs = at + 4
        end = signs + -(-count // 8)
        if count == 0 or end > len(payload):
            raise CodecError(f"{len(payload)} bytes do not hold {count} signs")
        negative = unpack_bits(payload[signs:end], count)
        magnitude = np.frombuffer(payload[at:signs], "<f4")[0].astype(np.float32)
        indices = unpack_positions(payload[end:], count, layout.size)
        return Update(_rebuild(magnitude, negative), indices, layout.size)


def _best_count(values: Vector) -> int:
    """How many of the largest values one magnitude stands for best: with the sum S of k of them, S^2 / k is kept."""
    if not values.size:
        return 0
    sums = np.cumsum(np.sort(np.abs(values))[::-1], dtype=np.float64)
    return int(np.argmax(np.square(sums) / np.arange(1, len(sums) + 1))) + 1


def _cost(count: int) -> int:
    return len(varint(count)) + 4 + -(-count // 8)


def _rebuild(magnitude: np.float32, negative: NDArray[np.uint8]) -> Vector:
    return np.array([magnitude, -magnitude], np.float32)[negative]
