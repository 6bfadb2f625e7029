"""How fast this device is: time and joules of a training step by bundle, and what its link carries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_runtime.agent.limits import Rate

if TYPE_CHECKING:
    from collections.abc import Hashable

SMOOTHING = 0.5  # weight of the newest figure
BUNDLES_KEPT = 8
LEAST_BYTES = 16 * 1024  # a smaller transfer says more of the round trip than of the link


def smoothed(before: float | None, now: float | None) -> float | None:
    """The exponentially weighted mean; what is unknown changes nothing."""
    if now is None:
        return before
    return now if before is None else (1.0 - SMOOTHING) * before + SMOOTHING * now


class StepRates(msgspec.Struct, array_like=True):
    """Of the bundles trained last, oldest first: bundle (SHA-256), seconds and joules of a step."""

    bundles: list[tuple[str, float | None, float | None]] = []

    def trained(self, bundle: str, steps: int, train_s: float, joules: float | None) -> None:
        """A job took so long for its steps, and drew so much; ``joules``: None if unknown."""
        if steps <= 0 or train_s <= 0.0:
            return
        before = self.all().get(bundle, Rate())
        step_joules = None if joules is None else joules / steps
        now = (bundle, smoothed(before.step_s, train_s / steps), smoothed(before.step_joules, step_joules))
        kept = [entry for entry in self.bundles if entry[0] != bundle]
        self.bundles = [*kept, now][-BUNDLES_KEPT:]

    def doubted(self, bundle: str) -> None:
        """A job was declined by what a step took: that may have been a bad moment, so it is believed half as much."""
        self.bundles = [
            (name, step_s if step_s is None or name != bundle else step_s / 2, step_joules)
            for name, step_s, step_joules in self.bundles
        ]

    def all(self) -> dict[str, Rate]:
        """By bundle."""
        return {bundle: Rate(step_s, step_joules) for bundle, step_s, step_joules in self.bundles}

    @property
    def last(self) -> str:
        """The bundle trained last; empty: none yet."""
        return self.bundles[-1][0] if self.bundles else ""


class Throughput:
    """kbit/s of one direction of the link, from transfers as they happen.

    Transfers at the same time share the link, so they are counted together: bytes of those that ended, over the time in
    which at least one was under way. What a lost connection interrupted says nothing.
    """

    def __init__(self, kbit_s: float | None = None) -> None:
        self.kbit_s = kbit_s
        self._open: dict[Hashable, int] = {}
        self._began_s = 0.0
        self._ended_bytes = 0

    def begins(self, now: float, transfer: Hashable, size_bytes: int) -> None:
        """A transfer of so many bytes begins."""
        if not self._open:
            self._began_s, self._ended_bytes = now, 0
        self._open[transfer] = size_bytes

    def ends(self, now: float, transfer: Hashable) -> None:
        """All of its bytes went over the link since it began; one that did not begin, or was stopped, says nothing."""
        size_bytes = self._open.pop(transfer, None)
        if size_bytes is None:
            return
        self._ended_bytes += size_bytes
        if not self._open and self._ended_bytes >= LEAST_BYTES and now > self._began_s:
            self.kbit_s = smoothed(self.kbit_s, self._ended_bytes / 125.0 / (now - self._began_s))

    def stops(self) -> None:
        """The connection ended, or a transfer was given up: what is under way says nothing."""
        self._open.clear()
