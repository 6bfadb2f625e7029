"""Codecs for updates and models: a chain of stages, framed with its configuration."""

from edge_runtime.compression.base import Layout, Packet, Stage
from edge_runtime.compression.registry import codec_names, decode, encode

__all__ = ["Layout", "Packet", "Stage", "codec_names", "decode", "encode"]
