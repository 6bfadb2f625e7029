"""No compression: the float32 values as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from edge_runtime.compression.base import Layout, Packet


class Raw:
    """Passes the packet through; checks that it holds one float32 vector of the layout's size."""

    name: ClassVar[str] = "raw"

    def config(self) -> dict[str, Any]:
        """Nothing to configure."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Raw:
        """Raises CodecError if there is any configuration."""
        if config:
            raise CodecError(f"codec 'raw' takes no configuration, got {sorted(config)}")
        return cls()

    def encode(self, packet: Packet, layout: Layout, state: bytes) -> tuple[Packet, bytes]:
        """The same packet, not copied."""
        return self.decode(packet, layout), state

    def decode(self, packet: Packet, layout: Layout) -> Packet:
        """The same packet, not copied; raises CodecError if it is not one float32 vector ``[layout.size]``."""
        values = packet.arrays.get("values")
        if values is None or len(packet.arrays) != 1 or values.dtype != np.float32:
            raise CodecError("codec 'raw' needs one float32 array 'values'")
        if values.shape != (layout.size,):
            raise CodecError(f"vector has shape {values.shape}, the layout needs ({layout.size},)")
        return packet
