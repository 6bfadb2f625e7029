"""What jobs drew today and what went over the link this month, counted so that clocks and restarts cannot cheat.

A period ends when a later day (or month) begins. A clock that goes back ends none, so it cannot give a day's joules
twice; one that had been too far ahead is believed again when the device has run for a whole period since. A clock that
was never set counts into the period that was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_runtime.agent.hours import DAY_S

if TYPE_CHECKING:
    from edge_runtime.agent.hours import LocalTime

MONTH_S = 28 * DAY_S


class Period(msgspec.Struct, array_like=True):
    """``number`` of the day or month, what was used in it, and for how long the device ran in it."""

    number: int = 0
    used: float = 0.0
    ran_s: float = 0.0

    def turn(self, number: int, length_s: float) -> None:
        """It is day (or month) ``number`` by the clock."""
        if number > self.number or (number < self.number and self.ran_s >= length_s):
            self.number, self.used, self.ran_s = number, 0.0, 0.0


class Usage(msgspec.Struct, array_like=True):
    """Joules of a day, bytes of a month."""

    day: Period = msgspec.field(default_factory=Period)
    month: Period = msgspec.field(default_factory=Period)

    def passed(self, local: LocalTime | None, ran_s: float) -> None:
        """Time went on.

        Args:
            local: by the clock now; None: it was never set.
            ran_s: since the last call, by a clock that nobody sets.
        """
        self.day.ran_s += max(0.0, ran_s)
        self.month.ran_s += max(0.0, ran_s)
        if local is not None:
            self.day.turn(local.day, DAY_S)
            self.month.turn(local.month, MONTH_S)

    def drew(self, joules: float) -> None:
        """A job drew this."""
        self.day.used += max(0.0, joules)

    def moved(self, size_bytes: int) -> None:
        """This went over the link."""
        self.month.used += max(0, size_bytes)
