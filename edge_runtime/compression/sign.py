"""One bit per value: its sign, scaled by the mean magnitude of its tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.compression.packing import pack_bits, unpack_bits
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector


class Sign(Codec):
    """Signs, and the L1 norm over the size of each tensor; zero counts as positive.

    Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", ICML 2019, algorithm 1
    (EF-SignSGD), for each tensor apart. Biased: it needs its error feedback.
    Payload: float32 per tensor, then the bits.
    """

    name: ClassVar[str] = "sign"
    number: ClassVar[int] = 10

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:  # noqa: ARG002
        """1 bit per element and 4 bytes per tensor; the budget is not kept to."""
        scales = np.zeros(len(layout.names), "<f4")
        for tensor, (_, _, start, end) in enumerate(layout.spans()):
            if end > start:
                scales[tensor] = np.abs(values[start:end]).mean(dtype=np.float64)
        negative = (values < 0).astype(np.uint8)
        payload = scales.tobytes() + pack_bits(negative)
        return Encoded(payload, Update(_rebuild(scales, negative, layout)), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Dense."""
        end = 4 * len(layout.names)
        if len(payload) < end:
            raise CodecError(f"{len(payload)} bytes do not hold {len(layout.names)} scales")
        negative = unpack_bits(payload[end:], layout.size)
        return Update(_rebuild(np.frombuffer(payload[:end], "<f4"), negative, layout))


def _rebuild(scales: NDArray[np.float32], negative: NDArray[np.uint8], layout: Layout) -> Vector:
    vector = np.empty(layout.size, np.float32)
    for scale, (_, _, start, end) in zip(scales.astype(np.float32), layout.spans(), strict=True):
        vector[start:end] = np.array([scale, -scale])[negative[start:end]]
    return vector
