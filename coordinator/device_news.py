"""What the store and the log learn of the devices: what is new, in batches, however many devices beat or come at once.

The store is where other processes look. A device that joined, left or announced something else is stored within a
second or so; heartbeats change a row once a minute at most. Both are spread over time, since the thread that writes
rows is the one that answers devices.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.events import Row
    from coordinator.fleet import Fleet

log = logging.getLogger("edge.coordinator")

BEAT_SAVE_S = 60.0
ROWS_AT_ONCE = 250
LINES_AT_ONCE = 20  # between two saves; more are summed up in one line


class DeviceNews:
    """Collects news of devices until :meth:`save`.

    Args:
        fleet: the devices.
        save: stores rows in one transaction.
    """

    def __init__(self, fleet: Fleet, save: Callable[[list[Row]], None]) -> None:
        self._fleet, self._save = fleet, save
        self._changed: dict[str, None] = {}  # in the order of the changes
        self._beaten: set[str] = set()
        self._saved_s: dict[str, float] = {}
        self._lines = 0
        self._unsaid: Counter[str] = Counter()

    def changed(self, device: str) -> None:
        """The device said something new."""
        self._changed[device] = None

    def beaten(self, device: str) -> None:
        """A heartbeat came, of whatever is known by now."""
        self._beaten.add(device)

    def say(self, device: str, what: str) -> None:
        """Logs that a device "joined" or "left"."""
        self._lines += 1
        if self._lines <= LINES_AT_ONCE:
            log.info("device %s %s", device, what)
        else:
            self._unsaid[what] += 1

    def save(self, now_s: float) -> bool:
        """Stores what is due, the oldest news first; True if more waits. ``now_s`` is monotonic.

        Raises:
            StoreError: it cannot be stored; it stays due.
        """
        due = [name for name in self._beaten if now_s - self._saved_s.get(name, -BEAT_SAVE_S) >= BEAT_SAVE_S]
        names = list(self._changed | dict.fromkeys(sorted(due)))[:ROWS_AT_ONCE]
        devices = [device for device in map(self._fleet.get, names) if device is not None]
        if devices:
            self._save([device.row() for device in devices])
        for name in names:
            self._changed.pop(name, None)
            self._beaten.discard(name)
            self._saved_s[name] = now_s
        return bool(self._changed) or len(due) > ROWS_AT_ONCE

    def sum_up(self) -> None:
        """Logs how many joined and left beyond those named; to be called every second."""
        for what, count in self._unsaid.items():
            online = sum(device.online for device in self._fleet.devices())
            log.info("and %d more devices %s; %d are online", count, what, online)
        self._lines = 0
        self._unsaid.clear()
