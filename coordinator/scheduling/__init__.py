"""Who takes part in a round: selectors by name."""

from __future__ import annotations

from coordinator.plugins import Registry
from coordinator.scheduling.base import Choice, Note, Outcome, RoundRequest, Selection, Selector
from coordinator.scheduling.random import RandomSelector

SELECTORS: Registry[Selector] = Registry(
    "selector", "coordinator.selectors", {RandomSelector.name: RandomSelector.from_options}
)

__all__ = ["SELECTORS", "Choice", "Note", "Outcome", "RoundRequest", "Selection", "Selector"]
