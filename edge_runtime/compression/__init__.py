"""Codecs for updates and models: transforms, a codec, a container."""

from edge_runtime.compression.base import Codec, Layout, Update
from edge_runtime.compression.registry import codec_names

__all__ = ["Codec", "Layout", "Update", "codec_names"]
