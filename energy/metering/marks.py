"""What happened to the machine while a window was open: throttling, another power mode, other clocks.

A governor changes clocks with the load all the time; that is no fault, the joules are those of the work. A figure is
doubtful when the *ceiling* moved: the highest clock that was seen in one half of the window lies more than a tenth
below that of the other half. CPU clusters count together, since work may move between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from energy.metering.conditions import Conditions

CLOCK_CHANGE = 0.1
LEAST_BINS = 10  # readings (or pairs, fours... of them) before halves are compared
MOST_BINS = 32
EDGE_AGE_S = 0.2  # conditions this old are fresh enough for an edge
PERIOD_S = 1.0
SHARE = 1 / 200  # of the time that reading conditions may take: vcgencmd is a process each time


class Watch:
    """Reads conditions as often as pays; ``latest`` is None where nothing tells of them."""

    def __init__(self, read: Callable[[], Conditions] | None, clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._read_s = -1e9
        self._took_s = 0.0
        self.latest: Conditions | None = None

    def look(self, *, edge: bool) -> bool:
        """Whether there is something new, at an edge of a window or in between."""
        if self._read is None:
            return False
        began_s = self._clock()
        if began_s - self._read_s < max(EDGE_AGE_S if edge else PERIOD_S, self._took_s / SHARE):
            return False
        self.latest = self._read()
        self._read_s = self._clock()
        self._took_s = self._read_s - began_s
        return True


class _Ceiling:
    """The highest clock over time, in at most ``MOST_BINS`` stretches of the same length."""

    def __init__(self) -> None:
        self._bins: list[int] = []
        self._width = 1
        self._filled = 0

    def add(self, hertz: int) -> None:
        if self._filled == 0:
            self._bins.append(hertz)
        else:
            self._bins[-1] = max(self._bins[-1], hertz)
        self._filled = (self._filled + 1) % self._width
        if len(self._bins) == MOST_BINS and self._filled == 0:
            self._bins = [max(pair) for pair in zip(self._bins[::2], self._bins[1::2], strict=True)]
            self._width *= 2

    def halves(self) -> tuple[int, int] | None:
        if len(self._bins) < LEAST_BINS:
            return None
        middle = len(self._bins) // 2
        return max(self._bins[:middle]), max(self._bins[middle:])


class Marks:
    """Collects what speaks against one window; ``idle`` windows have no clocks worth comparing."""

    def __init__(self, first: Conditions | None, *, idle: bool) -> None:
        self._first = first
        self._last = first
        self._idle = idle
        self._causes: dict[str, None] = {}
        self._modes: dict[str, None] = {}
        self._ceilings: dict[str, _Ceiling] = {}
        if first is not None:
            self.see(first)

    def see(self, conditions: Conditions) -> None:
        """Takes note of new conditions."""
        if self._first is None:
            self._first = conditions
        self._last = conditions
        self._causes.update(dict.fromkeys(conditions.throttled or ()))
        if conditions.power_mode is not None:
            self._modes[conditions.power_mode] = None
        if self._idle:
            return
        clocks: dict[str, int] = {}
        for name, hertz in conditions.clocks_hz.items():
            kind = "GPU" if "gpu" in name.lower() else "CPU"
            clocks[kind] = max(clocks.get(kind, 0), hertz)
        for kind, hertz in clocks.items():
            self._ceilings.setdefault(kind, _Ceiling()).add(hertz)

    def problems(self) -> list[str]:
        """In words; empty if nothing happened."""
        found = [f"throttled: {cause}" for cause in self._causes]
        if self._first is not None and self._last is not None:
            for name, count in self._last.events.items():
                more = count - self._first.events.get(name, count)
                if more > 0:
                    found.append(f"throttling was counted: {name} ({more} more)")
        if len(self._modes) > 1:
            found.append(f"the power mode changed: {', '.join(self._modes)}")
        for kind, ceiling in self._ceilings.items():
            halves = ceiling.halves()
            if halves is not None and min(halves) < (1 - CLOCK_CHANGE) * max(halves):
                first, second = (hertz / 1e6 for hertz in halves)
                found.append(f"the {kind} clock changed: {first:.0f} MHz in the first half, {second:.0f} in the second")
        return found
