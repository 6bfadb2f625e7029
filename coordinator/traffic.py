"""What goes over the link for each run, in bytes of MQTT packets."""

from __future__ import annotations

from typing import NamedTuple

from edge_runtime.transport.link import packet_bytes

ACKNOWLEDGEMENT_BYTES = 4  # of the PUBACK that answers every packet, the other way


class Bytes(NamedTuple):
    """Packets of one run. ``bundle`` is that part of ``down`` that was chunks of its bundle."""

    up: int = 0
    down: int = 0
    bundle: int = 0


class Traffic:
    """Counts packets by run: updates, requests and reports up; jobs, models, bundles and answers down.

    A chunk that several devices asked for counts for each of them, however it travelled: what a device's link carried
    is counted, the acknowledgement of each packet included. Bundles are counted apart, since a device fetches one once,
    for all runs that use it.
    """

    def __init__(self) -> None:
        self._of: dict[str, Bytes] = {}

    def up(self, run: str, topic: str, payload_bytes: int) -> None:
        """A packet came from a device, and was acknowledged."""
        self._add(run, Bytes(up=packet_bytes(topic, payload_bytes), down=ACKNOWLEDGEMENT_BYTES))

    def down(self, run: str, topic: str, payload_bytes: int, *, bundle: bool = False) -> None:
        """A packet went to a device, which acknowledged it."""
        size = packet_bytes(topic, payload_bytes)
        self._add(run, Bytes(up=ACKNOWLEDGEMENT_BYTES, down=size, bundle=size * bundle))

    def take(self, run: str) -> Bytes:
        """The bytes of a run since the last call."""
        return self._of.pop(run, Bytes())

    def _add(self, run: str, moved: Bytes) -> None:
        known = self._of.get(run, Bytes())
        self._of[run] = Bytes(*(one + other for one, other in zip(known, moved, strict=True)))
