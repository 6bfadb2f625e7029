"""The low-rank codec by itself: :mod:`edge_runtime.compression.lowrank` behind the codec seam."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Codec, Encoded, Update, Value
from edge_runtime.compression.lowrank import decode_low_rank, encode_low_rank, predicts
from edge_runtime.compression.ratio import allowed_bytes
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_runtime.compression.base import Layout, Request, State, Vector


class LowRank(Codec):
    """Truncated singular value decompositions under a budget.

    Options: ``target_ratio``, raw bytes through those of the container (0: the budget's, or 32 without one).
    """

    name: ClassVar[str] = "lowrank"
    number: ClassVar[int] = 4
    keeps_budget: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Value]] = {"target_ratio": 0.0}

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options; raises CodecError."""
        super().__init__(options)
        self._ratio = float(self.options["target_ratio"])
        if self._ratio < 0:
            raise CodecError(f"codec 'lowrank': target_ratio {self._ratio:g} must not be negative")

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """The payload; an empty one, an update of zeros, if the budget holds nothing."""
        room = allowed_bytes(values.size, self._ratio, request)
        try:
            payload, vector = encode_low_rank(values, layout, room, request.reference)
        except CodecError:  # rounded beyond float32's range, which half of it is not
            payload, vector = encode_low_rank(values * np.float32(0.5), layout, room, request.reference)
        return Encoded(payload, Update(vector), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """The dense update of an encoding without ``Request.reference``; raises CodecError."""
        return self.decode_against(payload, layout, None)

    def decode_against(self, payload: memoryview, layout: Layout, reference: Vector | None) -> Update:
        """The dense update; raises CodecError."""
        return Update(decode_low_rank(payload, layout, reference))

    def predicts(self, payload: memoryview, layout: Layout) -> bool:
        """Where pairs of layers are predicted."""
        return predicts(payload, layout)
