"""The battery of a virtual device: linear between events, so its level at any time costs one multiplication."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.simulation.traces import DeviceTrace

_JOULES_PER_WH = 3600.0


class Battery:
    """Joules of the device model, not measured. ``watts`` is what it loses, below 0 while it gains.

    Without a battery (mains) the level is always full.
    """

    __slots__ = ("_at_s", "_joules", "capacity_j", "reserve_j", "watts")

    def __init__(self, trace: DeviceTrace) -> None:
        self.capacity_j = math.inf if trace.battery_wh is None else trace.battery_wh * _JOULES_PER_WH
        on_mains = trace.battery_wh is None
        self._joules = math.inf if on_mains else self.capacity_j * trace.battery_percent / 100
        self.reserve_j = -math.inf if on_mains else self.capacity_j * trace.reserve_percent / 100
        self._at_s = 0.0
        self.watts = 0.0

    def level_j(self, now_s: float) -> float:
        """What is in it, between 0 and its capacity."""
        level = self._joules - self.watts * (now_s - self._at_s) if self.watts else self._joules
        return min(max(level, 0.0), self.capacity_j)

    def percent(self, now_s: float) -> float | None:
        """The level in percent; None on mains."""
        return None if math.isinf(self.capacity_j) else min(100.0, 100.0 * self.level_j(now_s) / self.capacity_j)

    def set_watts(self, now_s: float, watts: float) -> None:
        """From now on it loses so much."""
        self._joules, self._at_s, self.watts = self.level_j(now_s), now_s, watts

    def take(self, now_s: float, joules: float) -> None:
        """Takes joules out at once, as for bytes that went over the radio."""
        self._joules, self._at_s = max(self.level_j(now_s) - joules, 0.0), now_s

    def reaches_s(self, now_s: float, joules: float) -> float:
        """When the level is at ``joules`` if nothing changes: now if it is past that already, inf for never."""
        level = self.level_j(now_s)
        if math.isinf(level):
            return math.inf
        if self.watts > 0:
            return now_s + max(level - joules, 0.0) / self.watts
        if self.watts < 0:
            return now_s + max(joules - level, 0.0) / -self.watts if joules <= self.capacity_j else math.inf
        return math.inf
