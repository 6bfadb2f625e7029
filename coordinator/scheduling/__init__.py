"""Who takes part in a round: selectors by name. Their numpy is loaded when a run uses one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from coordinator.plugins import Registry
from coordinator.scheduling.base import Choice, Note, Outcome, RoundRequest, Selection, Selector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_BUILTIN = {
    "random": "random:RandomSelector",
    "power_of_choice": "power_of_choice:PowerOfChoice",
    "oort": "oort:Oort",
    "eafl": "eafl:Eafl",
    "refl": "refl:Refl",
    "energy_aware": "energy_aware:EnergyAware",
}


def _factory(target: str) -> Callable[[Mapping[str, float]], Selector]:
    module, _, name = target.partition(":")

    def make(options: Mapping[str, float]) -> Selector:
        found = getattr(import_module(f"coordinator.scheduling.{module}"), name)
        return cast("Selector", found.from_options(options))

    return make


SELECTORS: Registry[Selector] = Registry(
    "selector", "coordinator.selectors", {name: _factory(target) for name, target in _BUILTIN.items()}
)

__all__ = ["SELECTORS", "Choice", "Note", "Outcome", "RoundRequest", "Selection", "Selector"]
