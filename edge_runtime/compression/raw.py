"""No compression: the float32 values as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from edge_runtime.compression.base import Layout, Request, State, Vector


class Raw(Codec):
    """Little-endian float32, viewed in place when decoded."""

    name: ClassVar[str] = "raw"
    number: ClassVar[int] = 1
    lossless: ClassVar[bool] = True
    feedback: ClassVar[bool] = False
    alignment: ClassVar[int] = 4

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:  # noqa: ARG002
        """The values' own memory."""
        payload = np.ascontiguousarray(values, "<f4").data.cast("B") if values.size else b""
        return Encoded(payload, Update(values), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """A read-only view of the payload."""
        if len(payload) != 4 * layout.size:
            raise CodecError(f"{len(payload)} bytes for {layout.size} float32 numbers")
        return Update(np.frombuffer(payload, "<f4"))
