"""Client methods by name: the built-in ones, and those of installed packages (group ``edge_runtime.methods``)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from edge_runtime.errors import TrainingError
from edge_runtime.plugins import any_installed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

    from edge_runtime.methods.base import ClientMethod

GROUP = "edge_runtime.methods"
_BUILT_IN = {
    "fedamd": "edge_runtime.methods.fedamd:FedAmd",
    "fedavg": "edge_runtime.methods.fedavg:FedAvg",
    "fedprox": "edge_runtime.methods.fedprox:FedProx",
}


def method_names() -> list[str]:
    """Names of all methods, sorted; imports none of them."""
    return sorted({*_BUILT_IN, *_entry_points()})


def method_class(name: str) -> type[ClientMethod]:
    """The class of a method.

    Raises:
        TrainingError: there is no such method, or its package cannot be imported.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        built_in: type[ClientMethod] = getattr(import_module(module), attribute)
        return built_in
    entry = _entry_points().get(name)
    if entry is None:
        raise TrainingError(f"method {name[:64]!r} is unknown here; known: {', '.join(method_names())}")
    try:
        found: type[ClientMethod] = entry.load()
    except Exception as error:
        raise TrainingError(f"method {name!r} cannot be imported from {entry.value}: {error}") from error
    return found


def create_method(name: str, options: Mapping[str, float] | None = None) -> ClientMethod:
    """A method for one job; raises TrainingError for an unknown method or option."""
    return method_class(name)(options)


def _entry_points() -> dict[str, EntryPoint]:
    if not any_installed(GROUP):
        return {}
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}
