"""Half precision: float16 with a power of two per tensor, losslessly packed after that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.compression.zstd import pack_planes, unpack_planes
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector

_LARGEST = 2.0**15 - 2.0**4  # the float16 below 2^15: times 2^113, the largest scale, it is still a float32


class Half(Codec):
    """IEEE 754 binary16, rounded to nearest, and a Zstandard frame of its byte planes.

    Each tensor is scaled so that its largest value is near the top of the range: nothing overflows, and values down to
    2^-29 of the largest survive, as mixed-precision training does by loss scaling (Micikevicius et al., ICLR 2018,
    section 3.2). Payload: int8 exponent per tensor, then the frame. The error, at most 2^-11 of a value, is not worth
    the memory of a residual, so error feedback is off unless asked for.
    """

    name: ClassVar[str] = "half"
    number: ClassVar[int] = 14
    feedback: ClassVar[bool] = False

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:  # noqa: ARG002
        """About 2 bytes per element; the budget is not kept to."""
        halves = np.empty(layout.size, "<f2")
        exponents = np.zeros(len(layout.names), np.int8)
        for tensor, (_, _, start, end) in enumerate(layout.spans()):
            exponents[tensor], halves[start:end] = to_half(values[start:end])
        return Encoded(exponents.tobytes() + pack_planes(halves), Update(_rebuild(halves, exponents, layout)), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """Dense."""
        count = len(layout.names)
        if len(payload) < count:
            raise CodecError(f"{len(payload)} bytes do not hold {count} exponents")
        halves = unpack_planes(payload[count:], np.dtype("<f2"), layout.size)
        return Update(_rebuild(halves, np.frombuffer(payload[:count], np.int8), layout))


def to_half(values: NDArray[np.float32]) -> tuple[int, NDArray[np.float16]]:
    """Exponent (int8 range) and little-endian float16 of the same shape, with ``values = half * 2^exponent``."""
    peak = float(max(values.max(), -values.min())) if values.size else 0.0
    if peak == 0:
        return 0, np.zeros(values.shape, "<f2")
    exponent = max(math.frexp(peak)[1] - 15, -126)
    scaled = values * np.float32(2.0**-exponent)
    return exponent, np.clip(scaled, -_LARGEST, _LARGEST, out=scaled).astype("<f2")


def from_half(exponent: int, halves: NDArray[Any]) -> NDArray[np.float32]:
    """The inverse; a NaN stays one, what is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: NDArray[np.float32] = halves.astype(np.float32) * np.float32(2.0**exponent)
    return values


def _rebuild(halves: NDArray[Any], exponents: NDArray[np.int8], layout: Layout) -> Vector:
    vector = np.empty(layout.size, np.float32)
    for exponent, (_, _, start, end) in zip(exponents.tolist(), layout.spans(), strict=True):
        vector[start:end] = from_half(exponent, halves[start:end])
    return vector
