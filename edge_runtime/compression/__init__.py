"""Codecs for updates and models: a chain of stages, framed with its configuration."""

from edge_runtime.compression.base import Layout, Packet, Stage

__all__ = ["Layout", "Packet", "Stage"]
