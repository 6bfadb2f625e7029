"""AFA-CS: the server remembers the last update of every device, so that those who are away still count."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation import tables
from coordinator.aggregation.afa_cd import AfaCd
from coordinator.aggregation.base import itself

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.aggregation.base import Round, State, Sums, Vector


class AfaCs(AfaCd):
    """Yang et al., "Anarchic Federated Learning", ICML 2022: AFA-CS, for silos.

    The table holds ``G_i = delta_i / K_i`` of the last update of each device, zero before the first; those that arrived
    replace theirs, and the change is ``K / N * sum(G_i)`` over the ``N`` devices that have a row or may get one. So no
    device's absence biases the model, at the price of steps that are partly old. Of several updates of a device in one
    round the newest counts. Options and bounds as in AFA-CD, with the ``K`` of the round that an update came in.

    A row is a compressed file on disk; between rounds the server keeps two vectors, the sum of the rows and what
    rounding left of it.
    """

    name: ClassVar[str] = "afa_cs"
    table: ClassVar[bool] = True

    def init(self, size: int) -> State:
        """The sum of no rows."""
        return tables.empty(size)

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """New rows, then the mean of all."""
        reference = self.reference(round_)
        state = tables.replace(round_, state, self._rows(round_, reference))
        members = max(round_.members, int(state[tables.ROWS][0]))
        return reference * tables.mean(state, members), state

    def _rows(self, round_: Round, reference: float) -> Iterator[tuple[str, Vector]]:
        import numpy as np

        entries = tables.newest(round_.contributions)
        for entry, update in zip(entries, round_.each("delta", entries, itself), strict=True):
            row = update.vector() / np.float32(self.steps(entry, reference))
            yield entry.update.device, row.astype(np.float32)
