"""The server side: rounds, fleet, selection, aggregation, store. Nothing heavy is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.aggregation import ServerMethod
    from coordinator.plan import Plan, load_plan
    from coordinator.scheduling import Selector
    from coordinator.server import Coordinator
    from coordinator.settings import ServerSettings

_HOMES = {
    "Coordinator": "coordinator.server",
    "Plan": "coordinator.plan",
    "Selector": "coordinator.scheduling",
    "ServerMethod": "coordinator.aggregation",
    "ServerSettings": "coordinator.settings",
    "load_plan": "coordinator.plan",
}

__all__ = ["Coordinator", "Plan", "Selector", "ServerMethod", "ServerSettings", "load_plan"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'coordinator' has no attribute {name!r}")
    return getattr(import_module(home), name)
