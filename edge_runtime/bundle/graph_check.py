"""Looks the graphs of a bundle over before onnxruntime may load them; the walk is that of :mod:`energy.graph_check`."""

from __future__ import annotations

from edge_runtime.errors import BundleError
from energy import graph_check
from energy.graph_check import DEFAULT_LIMITS, GraphLimits, GraphSummary

__all__ = ["DEFAULT_LIMITS", "GraphLimits", "GraphSummary", "check_graph"]


def check_graph(data: bytes | memoryview, *, limits: GraphLimits = DEFAULT_LIMITS) -> GraphSummary:
    """Checks a serialised ONNX ``ModelProto`` and counts what is in it.

    Raises:
        BundleError: external data, an operator domain other than the standard one, too many nodes or fields, nesting
            too deep, or bytes that are no ONNX model.
    """
    try:
        return graph_check.check_graph(data, limits=limits)
    except graph_check.GraphError as error:
        raise BundleError(str(error)) from error
