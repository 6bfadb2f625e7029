"""What one step of the round machine collects."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from coordinator import events as e
from coordinator.ledger import ledger_row

if TYPE_CHECKING:
    from coordinator.fleet import FleetView
    from coordinator.run_state import RunState
    from edge_runtime.messages import EnergyUse


class Work:
    """What one step collects: rows to save, in one transaction, and what is said after that."""

    __slots__ = ("_rows", "fleet", "now", "out")

    def __init__(self, now: float, fleet: FleetView) -> None:
        self.now = now
        self.fleet = fleet
        self.out: list[e.Effect] = []
        self._rows: dict[int, e.Row] = {}

    def save(self, *rows: e.Row) -> None:
        """Rows of the state that changed; their content at the end of the step is saved, each once."""
        for row in rows:
            self._rows[id(row)] = row

    def note_energy(
        self, state: RunState, assignment: e.AssignmentRow, energy: EnergyUse | None, update: e.UpdateRow | None = None
    ) -> None:
        """Saves the ledger's row of a job that ended, with ``update`` or without one."""
        device = self.fleet.get(assignment.device)
        sources = {} if device is None else device.energy_sources
        elapsed_s = max(self.now - assignment.assigned_unix_s, state.plan.participation.deadline_s)
        self.save(ledger_row(assignment, energy, sources, elapsed_s=elapsed_s, update=update))

    def effects(self) -> list[e.Effect]:
        """Save first, with copies: the shell may write them while the state goes on."""
        if not self._rows:
            return self.out
        return [e.Save([copy.copy(row) for row in self._rows.values()]), *self.out]
