"""Bytes over the link of a virtual device: blobs that come, updates that go; broken off and gone on with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.simulation.agent import VirtualAgent
    from coordinator.simulation.device import VirtualDevice
    from edge_runtime.messages import BlobRef, UpdateId

CACHED = 4  # blobs


class _Transfer:
    """``left``: bytes that are still to go; ``number``: of the attempt that is under way, 0 for none."""

    __slots__ = ("begins_s", "ends_s", "left", "number")

    def __init__(self, size_bytes: int) -> None:
        self.left = float(size_bytes)
        self.begins_s = self.ends_s = 0.0
        self.number = 0


class Transfers:
    """Of one device; what came outlives :meth:`restart`."""

    __slots__ = ("_agent", "_cache", "_coming", "_device", "_going", "_number")

    def __init__(self, device: VirtualDevice, agent: VirtualAgent) -> None:
        self._device, self._agent = device, agent
        self._cache: dict[str, None] = {}
        self._number = 0
        self.restart()

    def restart(self) -> None:
        """The agent's process ended."""
        self._coming: dict[str, _Transfer] = {}
        self._going: dict[UpdateId, _Transfer] = {}
        self._device.free_link()

    def has(self, name: str) -> bool:
        """Whether a blob is here."""
        return name in self._cache

    def missing_bytes(self, *blobs: BlobRef) -> int:
        """What would have to come of these."""
        return sum(blob.size_bytes for blob in blobs if blob.sha256 not in self._cache)

    def fetch(self, blob: BlobRef) -> None:
        """Has a blob come, unless it is on its way."""
        if blob.sha256 not in self._coming:
            self._coming[blob.sha256] = _Transfer(blob.size_bytes)
            self._receive(blob.sha256)

    def stop_fetch(self, name: str) -> None:
        """Nobody waits for a blob any more."""
        self._coming.pop(name, None)

    def send(self, update: UpdateId, size_bytes: int, *, offers: bool = False) -> None:
        """Has the bytes of an update go, unless they are on their way; ``offers``: as an offer with all bytes."""
        if not self._device.connected:
            return
        transfer = self._going.setdefault(update, _Transfer(size_bytes))
        if not transfer.number:
            self._begin(transfer, up=True)
            self._device.world.timeline.at(transfer.ends_s, self._gone, update, transfer, transfer.number, offers)

    def on_up(self) -> None:
        """Connected again: what was to come goes on."""
        for name in list(self._coming):
            self._receive(name)

    def on_down(self) -> None:
        """The connection is gone; what came and went stays."""
        for transfer in self._coming.values():
            self._break_off(transfer, up=False)
        for transfer in self._going.values():
            self._break_off(transfer, up=True)
        self._device.free_link()

    def _begin(self, transfer: _Transfer, *, up: bool) -> None:
        self._number += 1
        transfer.number = self._number
        transfer.begins_s, transfer.ends_s = self._device.transfer(transfer.left, up=up)

    def _break_off(self, transfer: _Transfer, *, up: bool) -> None:
        now = self._device.world.timeline.now_s
        if transfer.number and now > transfer.begins_s:
            share = min(1.0, (now - transfer.begins_s) / max(transfer.ends_s - transfer.begins_s, 1e-9))
            self._agent.moved(None, transfer.left * share, up=up)
            transfer.left *= 1.0 - share
        transfer.number = 0

    def _receive(self, name: str) -> None:
        transfer = self._coming[name]
        if self._device.connected and self._device.world.server.up:
            self._begin(transfer, up=False)
            self._device.world.timeline.at(transfer.ends_s, self._came, name, transfer, transfer.number)

    def _came(self, name: str, transfer: _Transfer, number: int) -> None:
        if transfer.number != number or self._coming.get(name) is not transfer:
            return
        del self._coming[name]
        bundle = self._device.world.bundle.sha256
        while len(self._cache) >= CACHED:
            del self._cache[next(key for key in self._cache if key != bundle)]
        self._cache[name] = None
        self._agent.came(name, transfer.left)

    def _gone(self, update: UpdateId, transfer: _Transfer, number: int, offers: bool) -> None:
        if transfer.number != number or self._going.get(update) is not transfer:
            return
        del self._going[update]
        self._agent.gone(update, transfer.left, offers=offers)
