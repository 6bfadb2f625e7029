"""The bundle: a model with its training step as plain data, and how a device verifies it."""

from edge_runtime.bundle.graph_check import check_graph
from edge_runtime.bundle.reader import Bundle, layout_of

__all__ = ["Bundle", "check_graph", "layout_of"]
