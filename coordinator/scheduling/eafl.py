"""EAFL: Oort's score and the battery that would be left, both from 0 to 1, in one sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coordinator.scheduling.draws import Column, Mask, Rows, spread
from coordinator.scheduling.oort import Oort
from coordinator.scheduling.table import Table, willing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.scheduling.notes import Marks


class Eafl(Oort):
    """Arouj and Abdelmoniem, "Towards energy-aware federated learning on battery-powered clients", FedEdge 2022.

    ``U = weight * minmax(Oort) + (1 - weight) * (charge after the job)``, drawn as Oort does; those never tried have
    their weight times the charge after the job. Charge is a share of the battery, 1 for devices on mains.

    Other than the released code, where utilities of hundreds are added to watt-hours under twelve, so that the battery
    decides nothing: both terms are from 0 to 1. Nobody is taken below its reserve, and failures divide the whole score.

    Options, beside those of Oort:
        weight: of Oort's part.
        reserve_percent: of the battery, where a device's owner does not say.
    """

    name: ClassVar[str] = "eafl"
    defaults: ClassVar[Mapping[str, float]] = {**Oort.defaults, "weight": 0.25, "reserve_percent": 20.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Oort.ranges,
        "weight": (0.0, 1.0),
        "reserve_percent": (0.0, 100.0),
    }

    def ready(self, table: Table, marks: Marks) -> Mask:
        """Those that do not decline, and keep their reserve."""
        ready = willing(table, marks)
        after = self._after(table)
        reserve = np.where(np.isnan(table.reserve), self.options["reserve_percent"] / 100.0, table.reserve)
        marks.figure("charge_after", after)
        marks.figure("reserve", reserve)
        empty = ready & table.on_battery & (after < reserve)
        marks.mark(empty, "battery {charge_after:.0%} after the job would be under the reserve of {reserve:.0%}")
        return ready & ~empty

    def exploit(self, table: Table, tried: Rows, speed: Column, marks: Marks) -> Column:
        """Oort's score and the charge, weighed."""
        oort = spread(super().exploit(table, tried, speed, marks))
        weight = self.options["weight"]
        charge = np.maximum(self._after(table)[tried], 0.0)
        return np.asarray((weight * oort + (1.0 - weight) * charge) * table.fade[tried])

    def explore(self, table: Table, new: Rows, speed: Column) -> Column:
        """Oort's weight times the charge."""
        return np.asarray(super().explore(table, new, speed) * np.maximum(self._after(table)[new], 0.0))

    def _after(self, table: Table) -> Column:
        return table.charge_after(table.joules(table.steps))
