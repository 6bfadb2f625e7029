"""What is known about the devices: presence, what they announced, what they measured. Pure; time comes in.

Presence comes from the retained :class:`~edge_runtime.messages.DeviceState` of every device and its last will, so a
restarted coordinator knows the fleet as soon as it has subscribed. Sets of eligible devices are kept up to date at
every announcement: asking for them costs nothing per device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from coordinator.events import DeviceRow
from coordinator.heartbeats import NOTHING, numbers
from coordinator.ledger import LONGEST_TEXT
from edge_runtime.messages import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from coordinator.plan import Plan
    from edge_runtime.messages import DatasetInfo, DeviceState, EnergySource, Heartbeat

EARLY_KEPT = 20_000  # heartbeats of devices that never announced themselves; the broker gives them in any order
SOURCES_KEPT = 16  # of joules, per device: it has a sensor or two, and a model
CONFLICT_S = 600.0  # two agents with one name take turns within seconds; a replaced SD card does not come back


class Requirement(msgspec.Struct, frozen=True, kw_only=True):
    """What a device must have announced to take part. ``blob_bytes`` is the largest blob it will have to take."""

    dataset: str
    codecs: tuple[str, ...]
    method: str
    blob_bytes: int = 0
    abilities: tuple[str, ...] = ()


def requirement(plan: Plan, blob_bytes: int = 0) -> Requirement:
    """What a plan asks of a device."""
    codecs = tuple(sorted({plan.uplink.codec, plan.downlink.codec}))
    return Requirement(
        dataset=plan.dataset,
        codecs=codecs,
        method=plan.method,
        blob_bytes=blob_bytes,
        abilities=("standing",) if plan.participation.mode == "anarchic" else (),
    )


@dataclass
class Device:
    """One device. ``conflict`` says why it is not trusted at the moment, empty when all is well.

    ``energy_sources`` is all that it announced since this process began, by sensor: an update may come when the device
    measures with another one already. ``numbers`` are those of the heartbeat (:mod:`coordinator.heartbeats`).
    """

    name: str
    state: DeviceState
    last_contact_unix_s: float
    heartbeat: Heartbeat | None = None
    heartbeat_unix_s: float | None = None
    numbers: bytes = NOTHING
    conflict: str = ""
    instances: dict[str, float] = field(default_factory=dict)  # installation -> when it was last seen
    switched_unix_s: float = 0.0
    energy_sources: dict[str, EnergySource] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        """Whether the device is connected, as far as the broker told."""
        return self.state.online

    def heard(self, now: float, heartbeat: Heartbeat) -> None:
        """Takes in a heartbeat."""
        self.heartbeat, self.heartbeat_unix_s, self.numbers = heartbeat, now, numbers(heartbeat)

    def note_source(self) -> None:
        """Remembers where the device has its joules from now."""
        source = self.state.energy
        if source is None:
            return
        name = source.sensor[:LONGEST_TEXT]
        self.energy_sources.pop(name, None)
        while len(self.energy_sources) >= SOURCES_KEPT:
            del self.energy_sources[next(iter(self.energy_sources))]
        self.energy_sources[name] = source

    def dataset(self, name: str) -> DatasetInfo | None:
        """What the device said about one of its datasets."""
        return next((entry for entry in self.state.datasets if entry.name == name), None)

    def row(self) -> DeviceRow:
        """What the store keeps, for other processes to look at."""
        return DeviceRow(
            device=self.name,
            online=self.online,
            last_contact_unix_s=self.last_contact_unix_s,
            conflict=self.conflict,
            state=self.state,
            heartbeat=self.heartbeat,
        )


class FleetView(Protocol):
    """The read-only side of :class:`Fleet` that the round machine and selectors see."""

    def get(self, name: str) -> Device | None:
        """The device, or None if it never announced itself."""
        ...

    def eligible(self, need: Requirement) -> Collection[str]:
        """Names of the devices that are online, not in conflict, and announced all that is needed."""
        ...

    def names(self, need: Requirement) -> Sequence[str]:
        """The eligible devices, sorted."""
        ...

    def unfit_reasons(self, need: Requirement) -> Mapping[str, str]:
        """Why each other device cannot take part."""
        ...

    def arrivals(self, need: Requirement) -> int:
        """How often a device became eligible; where that has not changed, nobody new is there."""
        ...


class Fleet:
    """Registry of the devices."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}
        self._sorted: dict[Requirement, _Sorted] = {}
        self._early: dict[str, tuple[Heartbeat, float]] = {}  # retained, and here before the announcement

    def get(self, name: str) -> Device | None:
        return self._devices.get(name)

    def devices(self) -> Iterable[Device]:
        """All devices that ever announced themselves to this process."""
        return self._devices.values()

    def eligible(self, need: Requirement) -> Collection[str]:
        return self._by(need).fit

    def names(self, need: Requirement) -> Sequence[str]:
        return self._by(need).names()

    def unfit_reasons(self, need: Requirement) -> Mapping[str, str]:
        return self._by(need).unfit

    def arrivals(self, need: Requirement) -> int:
        return self._by(need).arrivals

    def forget(self, need: Requirement) -> None:
        """Stops keeping the sets for a requirement; called when the last run with it has ended."""
        self._sorted.pop(need, None)

    def _by(self, need: Requirement) -> _Sorted:
        known = self._sorted.get(need)
        if known is None:
            known = self._sorted[need] = _Sorted()
            for device in self._devices.values():
                known.put(device, need)
        return known

    def announce(self, now: float, state: DeviceState) -> bool:
        """Takes in a device's state; True if the device has just joined, so that it must be told its work.

        A repeated retained copy is no news, and an "offline" of an earlier session than the current one is the last
        will of a connection that was already replaced.
        """
        device = self._devices.get(state.device)
        if device is None:
            device = Device(state.device, state, now, instances={state.instance: now})
            early = self._early.pop(state.device, None)
            if early is not None:
                device.heard(early[1], early[0])
            device.note_source()
            self._devices[state.device] = device
            self._sort(device)
            return state.online
        if not state.online and state.session != device.state.session:
            return False
        joined = state.online and (not device.online or state.session != device.state.session)
        self._watch_instance(now, device, state)
        device.state = state
        device.note_source()
        device.last_contact_unix_s = now
        self._sort(device)
        return joined

    def measured(self, now: float, name: str, heartbeat: Heartbeat) -> None:
        """Takes in what a device says of itself; that of a device which has not announced itself waits for that."""
        device = self._devices.get(name)
        if device is None:
            self._early.pop(name, None)
            while len(self._early) >= EARLY_KEPT:
                del self._early[next(iter(self._early))]
            self._early[name] = (heartbeat, now)
            return
        device.heard(now, heartbeat)
        self.contact(now, name)

    def contact(self, now: float, name: str) -> None:
        """Notes that a message came from the device."""
        device = self._devices.get(name)
        if device is None:
            return
        device.last_contact_unix_s = now
        if device.conflict and now - device.switched_unix_s > CONFLICT_S:
            device.conflict = ""
            self._sort(device)

    def gone(self, now: float, name: str) -> None:
        """Notes that a device is offline where no last will says so (the broker itself was lost)."""
        device = self._devices.get(name)
        if device is not None and device.online:
            device.state = msgspec.structs.replace(device.state, online=False)
            device.last_contact_unix_s = now
            self._sort(device)

    def _watch_instance(self, now: float, device: Device, state: DeviceState) -> None:
        if not state.online:
            return
        before = device.state.instance
        if state.instance != before:
            back = now - device.instances.get(state.instance, -CONFLICT_S) < CONFLICT_S
            device.switched_unix_s = now
            if back:  # an installation that another one had replaced: both are running
                device.conflict = (
                    f"two agents use the name {device.name!r} (installations {before[:12]} and "
                    f"{state.instance[:12]}); give one of them another name and identity"
                )
        elif device.conflict and now - device.switched_unix_s > CONFLICT_S:
            device.conflict = ""
        device.instances = {name: seen for name, seen in device.instances.items() if now - seen < CONFLICT_S}
        device.instances[before] = device.last_contact_unix_s
        device.instances[state.instance] = now

    def _sort(self, device: Device) -> None:
        for need, known in self._sorted.items():
            known.put(device, need)


class _Sorted:
    """All devices for one requirement: who is fit, and why the others are not."""

    __slots__ = ("_names", "arrivals", "fit", "unfit")

    def __init__(self) -> None:
        self._names: list[str] | None = []
        self.fit: set[str] = set()
        self.unfit: dict[str, str] = {}
        self.arrivals = 0

    def put(self, device: Device, need: Requirement) -> None:
        reason, known = unfit(device, need), device.name in self.fit
        if reason:
            self.unfit[device.name] = reason
            self.fit.discard(device.name)
        elif not known:
            self.unfit.pop(device.name, None)
            self.fit.add(device.name)
            self.arrivals += 1
        if known == bool(reason):
            self._names = None

    def names(self) -> list[str]:
        if self._names is None:
            self._names = sorted(self.fit)
        return self._names


def unfit(device: Device, need: Requirement) -> str:
    """Why a device cannot take part; empty if it can."""
    return _unfit(device.state, device.conflict, need)


def unfit_row(row: DeviceRow, need: Requirement) -> str:
    """Like :func:`unfit`, from what the store keeps."""
    return _unfit(row.state, row.conflict, need)


def _unfit(state: DeviceState, conflict: str, need: Requirement) -> str:  # noqa: PLR0911 - one reason, one line
    if not state.online:
        return "offline"
    if conflict:
        return conflict
    oldest, newest = state.schema_versions
    if not oldest <= SCHEMA_VERSION <= newest + 1:
        return f"speaks message versions {oldest} to {newest}, not {SCHEMA_VERSION}"
    if all(entry.name != need.dataset for entry in state.datasets):
        return f"offers no dataset {need.dataset!r}"
    missing = [codec for codec in need.codecs if codec not in state.codecs]
    if missing:
        return f"lacks codec {missing[0]!r}"
    if need.method not in state.methods:
        return f"lacks method {need.method!r}"
    lacking = [ability for ability in need.abilities if ability not in state.abilities]
    if lacking:
        return f"lacks ability {lacking[0]!r}; update its agent"
    if state.limits is not None and state.limits.blob_bytes < need.blob_bytes:
        return f"takes blobs of at most {state.limits.blob_bytes} bytes, {need.blob_bytes} are needed"
    return ""
