"""Finds and calls the function that builds the model for the command line."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch

from exporters.errors import UsageError
from exporters.export import export_bundle

_EXAMPLE_BATCH = 8


def load(source: str, input_shape: tuple[int, ...] | None, input_dtype: str) -> dict[str, Any]:
    """Calls ``MODULE:FUNCTION`` and returns keyword arguments of `export_bundle`, with a name.

    Raises:
        UsageError: it cannot be imported, fails, or returns something else than documented.
    """
    module_name, _, function_name = source.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"{source!r} must be MODULE:FUNCTION, for example examples.model_zoo:lenet")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UsageError(f"cannot import {module_name}: {error}; run this where the module lies") from error
    except AttributeError:
        raise UsageError(f"{module_name} has no function {function_name}") from None
    if not callable(function):
        raise UsageError(f"{source} is a {type(function).__name__}, not a function")
    try:
        built = function()
    except Exception as error:  # any failure of the user's function is the user's to read
        raise UsageError(f"{source}() failed: {type(error).__name__}: {error}") from error
    arguments = _arguments(source, built)
    if input_shape is not None:
        dtype = torch.float32 if input_dtype == "float32" else torch.int64
        arguments["example_input"] = torch.zeros((_EXAMPLE_BATCH, *input_shape), dtype=dtype)
    if "example_input" not in arguments:
        raise UsageError(f"{source} returns only a module; give --input-shape, or return (module, example_input)")
    arguments.setdefault("name", function_name)
    return arguments


def _arguments(source: str, built: Any) -> dict[str, Any]:
    if isinstance(built, torch.nn.Module):
        return {"module": built}
    if isinstance(built, tuple) and len(built) == 2:
        return {"module": built[0], "example_input": built[1]}
    if not isinstance(built, dict) or "module" not in built:
        kind = type(built).__name__
        raise UsageError(f"{source} returns {kind}; return a module, (module, example_input), or a dict with 'module'")
    known = set(inspect.signature(export_bundle).parameters) - {"path", "progress"}
    unknown = sorted(set(built) - known)
    if unknown:
        raise UsageError(
            f"{source} returns {unknown[0]!r}, which export_bundle does not take; it takes {sorted(known)}"
        )
    return dict(built)
