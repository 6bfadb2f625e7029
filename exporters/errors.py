"""The errors of the exporter."""

from __future__ import annotations

from edge_runtime.errors import EdgeError


class ExportError(EdgeError):
    """A model cannot be exported, or its graphs do not compute what torch computes; names the layer and the cure."""


class UsageError(ExportError):
    """The exporter was called with arguments or inputs that cannot be right."""
