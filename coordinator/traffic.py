"""What goes over the link for each run, in bytes of MQTT packets."""

from __future__ import annotations

from typing import NamedTuple

from edge_runtime.transport.link import packet_bytes


class Bytes(NamedTuple):
    """Packets of one run. ``bundle`` is that part of ``down`` that was chunks of its bundle."""

    up: int = 0
    down: int = 0
    bundle: int = 0


class Traffic:
    """Counts packets by run: updates, requests and reports up; jobs, models, bundles and answers down.

    A chunk that several devices asked for counts for each of them, however it travelled: what a device's link carried
    is counted. Bundles are counted apart, since a device fetches one once, for all runs that use it.
    """

    def __init__(self) -> None:
        self._of: dict[str, Bytes] = {}

    def up(self, run: str, topic: str, payload_bytes: int) -> None:
        """A packet came from a device."""
        known = self._of.get(run, Bytes())
        self._of[run] = known._replace(up=known.up + packet_bytes(topic, payload_bytes))

    def down(self, run: str, topic: str, payload_bytes: int, *, bundle: bool = False) -> None:
        """A packet went to a device."""
        known, size = self._of.get(run, Bytes()), packet_bytes(topic, payload_bytes)
        self._of[run] = known._replace(down=known.down + size, bundle=known.bundle + size * bundle)

    def take(self, run: str) -> Bytes:
        """The bytes of a run since the last call."""
        return self._of.pop(run, Bytes())
