"""Turns a ``torch.nn.Module`` into a bundle: the training step as plain ONNX graphs for devices without torch.

The public names are loaded on first use, so that ``import exporters`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.errors import ExportError
    from exporters.export import ExportReport, export_bundle

__all__ = ["ExportError", "ExportReport", "export_bundle"]

_HOMES = {
    "ExportError": "exporters.errors",
    "ExportReport": "exporters.export",
    "export_bundle": "exporters.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
