"""The running integral of one rail: a trapezoid over power, or the differences of a counter that may wrap.

Only sums are kept, so a window of a day costs what a window of a second costs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from energy.errors import SensorError

if TYPE_CHECKING:
    from energy.sensors.base import Rail

ENOUGH_CHANGES = 10  # before the smallest change is taken for the resolution


class Track:
    """Joules of one rail since its first reading.

    Attributes:
        joules: up to the last reading.
        watts: at the last reading; of a counter the mean since the reading before.
        last_s: time of the last reading; None before the first.
        changes, squares: how many readings differ from the one before, and the sum of these differences squared
            (watts of a power rail, joules of a counter).
        step: the smallest change so far; 0 before any.
    """

    __slots__ = (
        "_before_joules",
        "_before_s",
        "_before_watts",
        "_slack_s",
        "changes",
        "joules",
        "last_s",
        "rail",
        "squares",
        "step",
        "value",
        "watts",
    )

    def __init__(self, rail: Rail, *, slack_s: float = 0.0) -> None:
        self.rail = rail
        self.joules = 0.0
        self.watts = 0.0
        self.value = 0.0
        self.last_s: float | None = None
        self.changes = 0
        self.squares = 0.0
        self.step = 0.0
        self._slack_s = slack_s  # how far a counter may run ahead of the clock: it is updated in jumps
        self._before_s = 0.0
        self._before_joules = 0.0
        self._before_watts = 0.0

    def check(self, at_s: float, value: float) -> None:
        """Whether a reading can be true.

        Raises:
            SensorError: ``implausible``.
        """
        rail = self.rail
        if not math.isfinite(value) or value < 0:
            raise SensorError("implausible", f"{rail.name} reads {value:g} {rail.unit}")
        if rail.unit == "watts":
            if value > rail.limit_watts:
                raise SensorError("implausible", f"{rail.name} reads {value:g} W, more than {rail.limit_watts:g} W")
            return
        if self.last_s is None:
            return
        grown = self._grown(value)
        if grown < 0:
            raise SensorError("implausible", f"{rail.name} fell from {self.value:g} to {value:g} J")
        if grown > rail.limit_watts * (at_s - self.last_s + self._slack_s):
            raise SensorError("implausible", f"{rail.name} grew by {grown:g} J in {at_s - self.last_s:.3g} s")

    def add(self, at_s: float, value: float) -> None:
        """Takes a reading that :meth:`check` let pass; one that is not later than the last is left out."""
        if self.last_s is None:
            self.last_s = self._before_s = at_s
            self.value = value
            self.watts = self._before_watts = value if self.rail.unit == "watts" else 0.0
            return
        seconds = at_s - self.last_s
        if seconds <= 0:
            return
        self._before_s, self._before_joules, self._before_watts = self.last_s, self.joules, self.watts
        if self.rail.unit == "watts":
            change = abs(value - self.value)
            self.joules += 0.5 * (self.value + value) * seconds
            self.watts = value
        else:
            change = self._grown(value)
            self.joules += change
            self.watts = change / seconds
        if change > 0:
            self.changes += 1
            self.squares += change * change
            self.step = change if self.step == 0.0 else min(self.step, change)
        self.value = value
        self.last_s = at_s

    def restart(self, at_s: float, value: float) -> None:
        """Goes on from here after a counter was set back; what came since the last reading is unknown."""
        self.value = value
        self.last_s = self._before_s = at_s
        self._before_joules = self.joules
        self.watts = 0.0

    def at(self, at_s: float) -> float:
        """Joules up to a time between the last two readings; after the last one the last power goes on."""
        if self.last_s is None:
            return 0.0
        if at_s >= self.last_s:
            return self.joules + self.watts * (at_s - self.last_s)
        whole = self.last_s - self._before_s
        part = max(at_s - self._before_s, 0.0)
        if whole <= 0:
            return self.joules
        if self.rail.unit == "joules":
            return self._before_joules + (self.joules - self._before_joules) * part / whole
        slope = (self.watts - self._before_watts) / whole
        return self._before_joules + self._before_watts * part + 0.5 * slope * part * part

    @property
    def resolution(self) -> float:
        """The smallest step of a reading: as the sensor says, or as far as can be seen; 0 if nothing tells."""
        if self.rail.resolution is not None:
            return self.rail.resolution
        return self.step if self.changes >= ENOUGH_CHANGES else 0.0

    def _grown(self, value: float) -> float:
        grown = value - self.value
        if grown < 0 and self.rail.wraps_at is not None:
            grown += self.rail.wraps_at
        return grown
