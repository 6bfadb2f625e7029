"""A virtual device: when it is there, what its link and its battery do. Its jobs are in :mod:`.agent`.

Only this part is a model, out of the device's trace. Control messages take half a round trip; bytes of bundles, models
and updates take their time on the link, one after the other in each direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordinator.simulation.agent import VirtualAgent
from coordinator.simulation.battery import Battery
from coordinator.simulation.settings import START_UNIX_S
from edge_runtime.agent.availability import Availability
from edge_runtime.agent.hours import DAY_S, HOUR_S
from edge_runtime.agent.limits import Known, Rate, held
from edge_runtime.heartbeat import heartbeat_of
from edge_runtime.messages import DatasetInfo, DeviceState, Telemetry

if TYPE_CHECKING:
    from coordinator.simulation.traces import DeviceTrace, PresenceTrace
    from coordinator.simulation.world import World
    from edge_runtime.messages import FromCoordinator, Heartbeat

RETURN_PERCENT = 5.0  # above its reserve a device that was lost to its battery comes back
ANNOUNCE_INTERVAL_S = 60.0  # as the daemon: between announcements of how many samples there are
FORESEES_S = 600.0  # so long what it foresees of its own presence is taken for true
_MB = 1e6
_MONDAY_S = 3 * DAY_S  # 1970 began on a Thursday


def see(table: Availability, presence: PresenceTrace, offset_s: float, begin_s: float, end_s: float) -> None:
    """Tells a device's table what it saw of its own presence between two virtual times."""
    at = begin_s
    while at < end_s:
        unix_s, place = START_UNIX_S + at, at + offset_s
        table.seen(unix_s, _week_second(unix_s), presence.online_at(place))
        at = min(at + HOUR_S, presence.next_change_s(place) - offset_s, end_s)


def _week_second(unix_s: float) -> float:
    return (unix_s + _MONDAY_S) % (7 * DAY_S)


class VirtualDevice:
    """``here``: its agent runs. ``flat``: it went because its battery was down to the reserve."""

    __slots__ = (
        "_announced_at_s",
        "_announced_samples",
        "_availability",
        "_busy_down_s",
        "_busy_up_s",
        "_charging",
        "_foresees",
        "_foresees_until_s",
        "_number_of_power",
        "_seen_s",
        "agent",
        "battery",
        "connected",
        "flat",
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
        self.step_s = world.settings.step_s * trace.slowdown
        self.agent: VirtualAgent | None = None
        self.here = self.flat = self.connected = self.training = self._charging = False
        self.session = 0
        self.lost_to_battery = 0
        self.trained_samples: int | None = None  # the agent knows how many there are once it has trained
        self._announced_samples: int | None = None
        self._announced_at_s = 0.0
        self._busy_up_s = self._busy_down_s = 0.0
        self._number_of_power = 0
        self._availability: Availability | None = None
        self._seen_s, self._foresees_until_s = 0.0, -1.0
        self._foresees: float | None = None
        self.owner_limits = world.limits_of(trace)

    # Presence

    def begin(self) -> None:
        """At the start of the run: everybody who is there is known already."""
        at = self.trace.presence_offset_s
        self._charging = self.presence.charging_at(at)
        if self.battery.level_j(0.0) <= self.battery.reserve_j:
            self.flat = True
        self.here = self.presence.online_at(at) and not self.flat
        self.connected = self.here
        self._set_power()
        self._plan_change()

    def _plan_change(self) -> None:
        now, offset = self.world.timeline.now_s, self.trace.presence_offset_s
        change = self.presence.next_change_s(now + offset) - offset
        if change < self.world.horizon_s:
            self.world.timeline.at(change, self._changed, change + offset)

    def _changed(self, at: float) -> None:
        """The trace says that it comes, goes, or begins or ends to charge; ``at`` is the trace's time."""
        self._charging = self.presence.charging_at(at)
        there = self.presence.online_at(at) and not self.flat
        if there and not self.here:
            self._come()
        elif self.here and not there:
            self._go()
        else:
            self._set_power()
        self._plan_change()

    def _come(self) -> None:
        self.here = True
        self._set_power()
        self.connect()

    def _go(self) -> None:
        self.here = False
        if self.agent is not None and self.world.settings.leaving == "ends":
            self.agent.stop()
        self.disconnect()
        self._set_power()

    def connect(self) -> None:
        """Connects to the broker, if both are there."""
        if self.connected or not self.here or not self.world.broker_up:
            return
        self.connected = True
        self.session += 1
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

    def _set_power(self) -> None:
        trace, battery = self.trace, self.battery
        if trace.battery_wh is None:
            return
        now = self.world.timeline.now_s
        watts = trace.idle_watts * self.here + trace.training_watts * self.training
        battery.set_watts(now, watts - trace.charge_watts * self._charging)
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
        self.training = training
        self._set_power()

    def radio_j(self, size_bytes: float, *, up: bool) -> float:
        """Modelled joules of so many bytes, taken from the battery now."""
        per_mb = self.trace.radio_joules_per_mb_up if up else self.trace.radio_joules_per_mb_down
        joules = per_mb * size_bytes / _MB
        if joules and self.trace.battery_wh is not None:
            self.battery.take(self.world.timeline.now_s, joules)
            self._set_power()
        return joules

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

    def heartbeat(self) -> Heartbeat:
        """What it says of itself now."""
        world, trace = self.world, self.trace
        now = world.timeline.now_s
        at = now + trace.link_offset_s
        told = world.settings.told_step
        knows_step = told or self.trained_samples is not None
        limit = held(self.known(), self.owner_limits) if world.settings.keep_reserve else None
        telemetry = Telemetry(
            uptime_s=now,
            clock_unix_s=START_UNIX_S + now + world.clock_offset_s(self.number),
            free_memory_bytes=trace.memory_mb * 1_000_000,
            battery_percent=self.battery.percent(now),
            on_external_power=True if trace.battery_wh is None else self._charging,
        )
        return heartbeat_of(
            telemetry,
            declines="" if limit is None else limit.limit,
            reserve_percent=None if trace.battery_wh is None else trace.reserve_percent,
            up_kbit_s=self.link.rate_kbit_s(at, up=True),
            down_kbit_s=self.link.rate_kbit_s(at, up=False),
            bundle_sha256="" if told else world.bundle.sha256,
            step_s=self.step_s if knows_step else None,
            step_joules=self.step_s * (trace.training_watts + trace.idle_watts) if knows_step else None,
            availability=self._availability_now(now),
        )

    def known(self, fetch_bytes: int | None = None) -> Known:
        """What its agent decides by; ``fetch_bytes`` would have to come for the job that is asked about."""
        world, trace, samples = self.world, self.trace, self.trained_samples
        at = world.timeline.now_s + trace.link_offset_s
        rate = Rate(self.step_s, self.step_s * (trace.training_watts + trace.idle_watts))
        return Known(
            battery_percent=self.battery.percent(world.timeline.now_s),
            on_external_power=True if trace.battery_wh is None else self._charging,
            battery_wh=trace.battery_wh,
            free_memory_bytes=trace.memory_mb * 1e6,
            up_kbit_s=self.link.rate_kbit_s(at, up=True),
            down_kbit_s=self.link.rate_kbit_s(at, up=False),
            joules_per_mb_up=trace.radio_joules_per_mb_up,
            joules_per_mb_down=trace.radio_joules_per_mb_down,
            rate=rate if world.settings.told_step or samples is not None else Rate(),
            samples={} if samples is None else {world.plan.dataset: samples},
            fetch_bytes=fetch_bytes,
        )

    def _availability_now(self, now: float) -> float | None:
        """What the device foresees, by its own table of the hours in which it was there; anew every ten minutes."""
        if now < self._foresees_until_s:
            return self._foresees
        table = self._availability
        if table is None:
            table = self._availability = Availability(self.world.presence_before(self.trace))
        see(table, self.presence, self.trace.presence_offset_s, self._seen_s, now)
        table.seen(START_UNIX_S + now, _week_second(START_UNIX_S + now), self.here)
        self._seen_s, self._foresees_until_s = now, now + FORESEES_S
        self._foresees = table.predict(_week_second(START_UNIX_S + now))
        return self._foresees

    def receive(self, session: int, message: FromCoordinator | Any) -> None:
        """A message of the coordinator arrived, unless the connection that it was sent to is gone."""
        if not self.connected or session != self.session:
            return
        if self.agent is None:
            self.agent = VirtualAgent(self)
        self.agent.receive(message)
