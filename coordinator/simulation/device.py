"""A virtual device: when it is there, what its link and its battery do. Its jobs are in :mod:`.agent`.

Only this part is a model, out of the device's trace. Control messages take half a round trip; bytes of bundles, models
and updates take their time on the link, one after the other in each direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordinator.simulation.agent import VirtualAgent
from coordinator.simulation.battery import Battery
from coordinator.simulation.conditions import VirtualConditions
from coordinator.simulation.owner import Heat
from edge_runtime.messages import DatasetInfo, DeviceState

if TYPE_CHECKING:
    from coordinator.simulation.traces import DeviceTrace
    from coordinator.simulation.world import World
    from edge_runtime.messages import EnergyUse, FromCoordinator

RETURN_PERCENT = 5.0  # above its reserve a device that was lost to its battery comes back
ANNOUNCE_INTERVAL_S = 60.0  # as the daemon: between announcements of how many samples there are
_MB = 1e6


class VirtualDevice:
    """``here``: its agent runs. ``flat``: it went because its battery was down to the reserve."""

    __slots__ = (
        "_announced_at_s",
        "_announced_samples",
        "_busy_down_s",
        "_busy_up_s",
        "_number_of_power",
        "agent",
        "battery",
        "charging",
        "conditions",
        "connected",
        "flat",
        "heat",
        "here",
        "link",
        "lost_to_battery",
        "name",
        "number",
        "owner_limits",
        "presence",
        "session",
        "step_s",
        "trace",
        "trained_samples",
        "training",
        "world",
    )

    def __init__(self, world: World, number: int, trace: DeviceTrace) -> None:
        self.world, self.number, self.trace, self.name = world, number, trace, trace.device
        self.link = world.traces.links[trace.link]
        self.presence = world.traces.presences[trace.presence]
        self.battery = Battery(trace)
        self.heat = None if trace.heat is None else Heat(trace.heat)
        self.step_s = world.settings.step_s * trace.slowdown
        self.agent: VirtualAgent | None = None
        self.here = self.flat = self.connected = self.training = self.charging = False
        self.session = 0
        self.lost_to_battery = 0
        self.trained_samples: int | None = None  # the agent knows how many there are once it has trained
        self._announced_samples: int | None = None
        self._announced_at_s = 0.0
        self._busy_up_s = self._busy_down_s = 0.0
        self._number_of_power = 0
        self.owner_limits = world.limits_of(trace)
        self.conditions = VirtualConditions(self, self.owner_limits, world.clock_offset_s(number))

    # Presence

    def begin(self) -> None:
        """At the start of the run: everybody who is there is known already."""
        at = self.trace.presence_offset_s
        self.charging = self.presence.charging_at(at)
        if self.battery.level_j(0.0) <= self.battery.reserve_j:
            self.flat = True
        self.here = self.presence.online_at(at) and not self.flat
        self.connected = self.here
        if self.heat is not None:
            self.heat.begin(self._watts)
        self._set_power()
        self._plan_change()

    def _plan_change(self) -> None:
        now, offset = self.world.timeline.now_s, self.trace.presence_offset_s
        change = self.presence.next_change_s(now + offset) - offset
        if change < self.world.horizon_s:
            self.world.timeline.at(change, self._changed, change + offset)

    def _changed(self, at: float) -> None:
        """The trace says that it comes, goes, or begins or ends to charge; ``at`` is the trace's time."""
        self.conditions.changes()
        self.charging = self.presence.charging_at(at)
        there = self.presence.online_at(at) and not self.flat
        if there and not self.here:
            self._come()
        elif self.here and not there:
            self._go()
        else:
            self._set_power()
        self._plan_change()

    def _come(self) -> None:
        self.conditions.changes()
        self.here = True
        self._set_power()
        self.connect()

    def _go(self) -> None:
        self.here = False
        if self.agent is not None and self.world.settings.leaving == "ends":
            self.agent.stop()
        self.disconnect()
        self._set_power()

    @property
    def may_come(self) -> bool:
        """Whether it, not here now, will ever be: its trace has it online some day, its battery not flat."""
        trace, presence = self.trace, self.presence
        return bool(presence.online) and not (self.flat and not (trace.charge_watts and presence.charging))

    def end(self) -> None:
        """The run is over: what it was at is charged until now."""
        if self.agent is not None:
            self.disconnect()
            self.agent.stop()

    def connect(self) -> None:
        """Connects to the broker, if both are there."""
        if self.connected or not self.here or not self.world.broker_up:
            return
        self.connected = True
        self.session += 1
        self.conditions.joined()
        self.announce()
        if self.agent is not None:
            self.agent.on_up()

    def disconnect(self) -> None:
        """Its connection is gone; the broker tells by its last will."""
        if not self.connected:
            return
        self.connected = False
        if self.agent is not None:
            self.agent.on_down()
        self.world.server.receive_state(self.announcement())

    def restart(self) -> None:
        """Its agent dies, and comes back at once from what it had stored."""
        if self.agent is not None:
            self.agent.stop()
        self.disconnect()
        self.connect()

    # Power

    @property
    def _watts(self) -> float:
        return self.trace.idle_watts * self.here + self.trace.training_watts * self.training

    def _set_power(self) -> None:
        trace, battery, now = self.trace, self.battery, self.world.timeline.now_s
        if self.heat is not None:
            self.heat.set_watts(now, self._watts)
        if trace.battery_wh is None:
            return
        battery.set_watts(now, self._watts - trace.charge_watts * self.charging)
        self._number_of_power += 1
        if self.here:
            battery_ends = battery.reaches_s(now, battery.reserve_j) if battery.watts > 0 else self.world.horizon_s
            if battery_ends < self.world.horizon_s:
                self.world.timeline.at(battery_ends, self._went_flat, self._number_of_power)
        elif self.flat and battery.watts < 0:
            enough = min(battery.reserve_j + battery.capacity_j * RETURN_PERCENT / 100, battery.capacity_j)
            self.world.timeline.at(battery.reaches_s(now, enough), self._charged, self._number_of_power)

    def _went_flat(self, number: int) -> None:
        if number == self._number_of_power and self.here:
            self.flat = True
            self.lost_to_battery += 1
            self.world.recorder.lost_to_battery += 1
            self._go()

    def _charged(self, number: int) -> None:
        if number == self._number_of_power and self.flat:
            self.flat = False
            if self.presence.online_at(self.world.timeline.now_s + self.trace.presence_offset_s):
                self._come()

    def train(self, *, training: bool) -> None:
        """It begins or ends to train."""
        self.conditions.changes()
        self.training = training
        self._set_power()

    def radio_j(self, size_bytes: float, *, up: bool) -> float:
        """Modelled joules of so many bytes, taken from the battery now."""
        per_mb = self.trace.radio_joules_per_mb_up if up else self.trace.radio_joules_per_mb_down
        joules = per_mb * size_bytes / _MB
        if joules and self.trace.battery_wh is not None:
            self.conditions.changes()
            self.battery.take(self.world.timeline.now_s, joules)
            self._set_power()
        return joules

    def worked(self, use: EnergyUse, samples: int | None) -> None:
        """A job, or the part of it that was done, drew this; ``samples``: that it counted, None if it did not."""
        self.conditions.changes()
        self.conditions.worked(use)
        if samples is not None:
            self.trained_samples = samples

    # Link

    def transfer(self, size_bytes: float, *, up: bool) -> tuple[float, float]:
        """When a transfer that is wanted now begins and ends; the next one in that direction comes after it."""
        begins = max(self.world.timeline.now_s, self._busy_up_s if up else self._busy_down_s)
        ends = begins + self.link.transfer_s(begins + self.trace.link_offset_s, size_bytes, up=up)
        if up:
            self._busy_up_s = ends
        else:
            self._busy_down_s = ends
        return begins, ends

    def free_link(self) -> None:
        """All transfers were broken off."""
        self._busy_up_s = self._busy_down_s = 0.0

    @property
    def latency_s(self) -> float:
        """What a message takes."""
        return self.link.round_trip_s / 2

    # What the coordinator is told

    def announce(self) -> None:
        """Announces itself, retained."""
        self._announced_samples, self._announced_at_s = self.trained_samples, self.world.timeline.now_s
        self.world.to_server(self, "state", self.announcement())

    def announce_samples(self) -> None:
        """It counted its samples by training; that is told once a minute at most."""
        if self.trained_samples != self._announced_samples:
            self.world.timeline.at(self._announced_at_s + ANNOUNCE_INTERVAL_S, self._announce_news)

    def _announce_news(self) -> None:
        if self.connected and self.trained_samples != self._announced_samples:
            self.announce()

    def announcement(self) -> DeviceState:
        """Its retained state, as the broker has it."""
        world = self.world
        return DeviceState(
            device=self.name,
            online=self.connected,
            session=f"s{self.session}",
            instance=self.name,
            codecs=world.codecs,
            methods=world.methods,
            backends=world.backends,
            datasets=[DatasetInfo(name=world.plan.dataset, samples=self._announced_samples)],
            limits=world.limits,
            energy=world.energy_source,
            abilities=world.abilities,
            battery_wh=self.trace.battery_wh,
        )

    def receive(self, session: int, message: FromCoordinator | Any) -> None:
        """A message of the coordinator arrived, unless the connection that it was sent to is gone."""
        if not self.connected or session != self.session:
            return
        if self.agent is None:
            self.agent = VirtualAgent(self)
        self.agent.receive(message)
