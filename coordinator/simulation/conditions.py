"""What a virtual device knows of itself, and says: as :mod:`edge_runtime.agent.conditions`, out of its trace.

Its heartbeats come at every connection and every interval from then on, as those of a daemon; made only when somebody
looks. So before anything changes that they tell, what the last one told is noted.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from coordinator.simulation.settings import START_UNIX_S
from edge_runtime.agent.availability import Availability
from edge_runtime.agent.hours import (
    DAY_S,
    EARLIEST_CLOCK_UNIX_S,
    HOUR_S,
    LATEST_CLOCK_UNIX_S,
    hours_left_s,
    hours_wait_s,
    local_time,
    parse_hours,
)
from edge_runtime.agent.limits import MB, Known, Rate, held, in_force
from edge_runtime.agent.usage import Usage
from edge_runtime.heartbeat import heartbeat_of
from edge_runtime.messages import Telemetry

if TYPE_CHECKING:
    from coordinator.simulation.device import VirtualDevice
    from coordinator.simulation.traces import PresenceTrace
    from edge_runtime.agent.config import LimitsConfig
    from edge_runtime.agent.hours import LocalTime
    from edge_runtime.agent.limits import Decline
    from edge_runtime.messages import EnergyUse, Heartbeat

FORESEES_S = 600.0  # so long what it foresees of its own presence is taken for true
_MONDAY_S = 3 * DAY_S  # 1970 began on a Thursday


class Noted(NamedTuple):
    """What changes by what the device does, as it was at one moment."""

    at_s: float
    clock_unix_s: float
    battery_percent: float | None
    charging: bool
    temperature_c: float | None
    samples: int | None
    joules_today: float
    month_bytes: float


class VirtualConditions:
    """Of one device. ``watches``: its trace has limits of its owner, so it looks at them as time passes."""

    __slots__ = (
        "_availability",
        "_clock_offset_s",
        "_device",
        "_foresees",
        "_foresees_until_s",
        "_joined_s",
        "_limits",
        "_noted",
        "_passed_s",
        "_seen_s",
        "_usage",
        "watches",
    )

    def __init__(self, device: VirtualDevice, limits: LimitsConfig, clock_offset_s: float) -> None:
        self._device, self._limits, self._clock_offset_s = device, limits, clock_offset_s
        self.watches = device.trace.limits is not None and bool(in_force(limits))
        counts = limits.joules_per_day is not None or limits.data_mb_per_month is not None
        self._usage = Usage() if counts else None
        self._passed_s = 0.0
        self._noted: Noted | None = None
        self._joined_s: float | None = None  # None: before the run
        self._availability: Availability | None = None
        self._seen_s, self._foresees_until_s = 0.0, -1.0
        self._foresees: float | None = None

    # Heartbeats

    def joined(self) -> None:
        """Connected: it says how it is, and does so again every interval from now on."""
        self._joined_s, self._noted = self._device.world.timeline.now_s, None

    def told_s(self, now_s: float) -> float:
        """When it sent its last heartbeat until ``now_s``; below 0: before the run."""
        interval_s = self._device.world.settings.heartbeat_interval_s
        if self._joined_s is None:  # it joined whenever that was
            name = f"{self._device.world.settings.seed}/{self._device.name}/heartbeat"
            share = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little") / 2.0**32
            self._joined_s = -share * interval_s
        return self._joined_s + max(0, math.floor((now_s - self._joined_s) / interval_s)) * interval_s

    def changes(self) -> None:
        """Something that heartbeats tell is about to change: what the last one told is kept."""
        self._note(self.told_s(self._device.world.timeline.now_s))

    def _note(self, told_s: float) -> Noted:
        noted, at_s = self._noted, max(told_s, 0.0)
        if noted is None or noted.at_s < at_s:
            noted = self._noted = self._at(at_s)
        return noted

    def _at(self, at_s: float) -> Noted:
        """How it is now, or was at a time since the last change."""
        device, heat, usage = self._device, self._device.heat, self._usage
        if usage is not None:
            self._pass(at_s)
        return Noted(
            at_s=at_s,
            clock_unix_s=self._clock(at_s),
            battery_percent=device.battery.percent(at_s),
            charging=device.charging,
            temperature_c=None if heat is None else heat.celsius(at_s),
            samples=device.trained_samples,
            joules_today=0.0 if usage is None else usage.day.used,
            month_bytes=0.0 if usage is None else usage.month.used,
        )

    def heartbeat(self, told_s: float) -> Heartbeat:
        """The heartbeat that it sent at ``told_s``, of :meth:`told_s`."""
        device, limits, world = self._device, self._limits, self._device.world
        trace, noted = device.trace, self._note(told_s)
        known = self._known(noted)
        rate, limit = known.rate, held(known, limits)
        reserve = limits.battery_reserve_percent
        if reserve is None and trace.battery_wh is not None:
            reserve = trace.reserve_percent
        joules, data_mb = limits.joules_per_day, limits.data_mb_per_month
        telemetry = Telemetry(
            uptime_s=noted.at_s,
            clock_unix_s=noted.clock_unix_s,
            free_memory_bytes=trace.memory_mb * 1_000_000,
            battery_percent=noted.battery_percent,
            temperature_c=noted.temperature_c,
            on_external_power=known.on_external_power,
        )
        return heartbeat_of(
            telemetry,
            declines="" if limit is None else limit.limit,
            max_temperature_c=limits.max_temperature_c,
            reserve_percent=reserve,
            link_metered=trace.metered,
            up_kbit_s=known.up_kbit_s,
            down_kbit_s=known.down_kbit_s,
            bundle_sha256="" if world.settings.told_step else world.bundle.sha256,
            step_s=rate.step_s,
            step_joules=rate.step_joules,
            availability=self._availability_at(noted.at_s),
            data_left_bytes=None if data_mb is None else data_mb * MB - noted.month_bytes,
            joules_left=None if joules is None else joules - noted.joules_today,
        )

    # Decisions

    def known(self, fetch_bytes: int | None = None) -> Known:
        """What its agent decides by now; ``fetch_bytes`` would have to come for the job that is asked about."""
        return self._known(self._at(self._device.world.timeline.now_s), fetch_bytes)

    def _known(self, noted: Noted, fetch_bytes: int | None = None) -> Known:
        device, trace, world, limits = self._device, self._device.trace, self._device.world, self._limits
        at_s, samples = noted.at_s + trace.link_offset_s, noted.samples
        knows_step = world.settings.told_step or samples is not None
        step_s = device.step_s
        needs_time = limits.hours is not None or self._usage is not None
        return Known(
            battery_percent=noted.battery_percent,
            on_external_power=True if trace.battery_wh is None else noted.charging,
            battery_wh=trace.battery_wh,
            temperature_c=noted.temperature_c,
            free_memory_bytes=trace.memory_mb * 1e6,
            link_metered=trace.metered,
            up_kbit_s=device.link.rate_kbit_s(at_s, up=True),
            down_kbit_s=device.link.rate_kbit_s(at_s, up=False),
            joules_per_mb_up=trace.radio_joules_per_mb_up,
            joules_per_mb_down=trace.radio_joules_per_mb_down,
            rate=Rate(step_s, step_s * (trace.training_watts + trace.idle_watts)) if knows_step else Rate(),
            samples={} if samples is None else {world.plan.dataset: samples},
            fetch_bytes=fetch_bytes,
            joules_today=noted.joules_today,
            month_bytes=int(noted.month_bytes),
            local=_local(noted.clock_unix_s) if needs_time else None,
        )

    def held(self) -> Decline | None:
        """The owner's limit that forbids training now."""
        return held(self.known(), self._limits)

    # Usage

    def joules_left(self) -> float | None:
        """Of the owner's limit for this day; None: there is none."""
        limit = self._limits.joules_per_day
        if limit is None or self._usage is None:
            return None
        self._pass(self._device.world.timeline.now_s)
        return max(0.0, limit - self._usage.day.used)

    def worked(self, use: EnergyUse) -> None:
        """A job, or the part of it that was done, drew this."""
        if self._usage is not None:
            self.changes()
            self._pass(self._device.world.timeline.now_s)
            parts = (use.train_mj, use.compress_mj, use.other_mj, use.radio_mj)
            self._usage.drew(1e-3 * sum(part for part in parts if part is not None))

    def moved(self, size_bytes: float) -> None:
        """This went over the link."""
        if self._usage is not None:
            self.changes()
            self._pass(self._device.world.timeline.now_s)
            self._usage.moved(math.ceil(size_bytes))

    def _pass(self, now_s: float) -> None:
        if self._usage is not None and now_s >= self._passed_s:
            self._usage.passed(_local(self._clock(now_s)), now_s - self._passed_s)
            self._passed_s = now_s

    # The clock, and what it saw

    def jump(self, jump_s: float) -> None:
        """Its clock is set."""
        now_s = self._device.world.timeline.now_s
        self.changes()
        for by_s in (0.0, jump_s):
            self._clock_offset_s += by_s
            self._pass(now_s)
            if self._availability is not None:
                self._see(now_s)
        self._foresees_until_s = -1.0

    def _clock(self, at_s: float) -> float:
        return START_UNIX_S + at_s + self._clock_offset_s

    def _availability_at(self, now_s: float) -> float | None:
        """What the device foresees, by its own table of the hours in which it was there; anew every ten minutes."""
        if now_s < self._foresees_until_s:
            return self._foresees
        if self._availability is None:
            self._availability = Availability(self._device.world.presence_before(self._device.trace, self._limits))
        self._see(now_s)
        week_second = _week_second(self._clock(now_s))
        self._foresees = None if week_second is None else self._availability.predict(week_second)
        self._foresees_until_s = now_s + FORESEES_S
        return self._foresees

    def _see(self, now_s: float) -> None:
        device, table = self._device, self._availability
        assert table is not None
        if now_s < self._seen_s:
            return
        offset_s = device.trace.presence_offset_s
        see(
            table,
            device.presence,
            offset_s,
            self._seen_s,
            now_s,
            limits=self._limits,
            clock_offset_s=self._clock_offset_s,
        )
        clock = self._clock(now_s)
        table.seen(clock, _week_second(clock), device.here)
        self._seen_s = now_s


def see(
    table: Availability,
    presence: PresenceTrace,
    offset_s: float,
    begin_s: float,
    end_s: float,
    *,
    limits: LimitsConfig,
    clock_offset_s: float = 0.0,
) -> None:
    """Tells a device's table what it saw of its own presence between two virtual times.

    Of the owner's limits those count that depend on nothing but time: charging, and hours.
    """
    spans = () if limits.hours is None else parse_hours(limits.hours)
    at = until = begin_s
    could = False
    while at < end_s:
        clock, place = START_UNIX_S + at + clock_offset_s, at + offset_s
        if at >= until:
            could, until = presence.online_at(place), presence.next_change_s(place) - offset_s
            if limits.only_when_charging:
                could = could and presence.charging_at(place)
            if spans:
                left_s = hours_left_s(spans, clock % DAY_S)
                could, until = could and left_s > 0.0, min(until, at + (left_s or hours_wait_s(spans, clock % DAY_S)))
        week_second = (clock + _MONDAY_S) % (7 * DAY_S) if at < 0.0 else _week_second(clock)  # before, it was right
        table.seen(clock, week_second, could)
        at = min(at + HOUR_S, until, end_s)


def _local(clock_unix_s: float) -> LocalTime | None:
    return local_time(clock_unix_s, utc=True)


def _week_second(clock_unix_s: float) -> float | None:
    """From Monday's midnight; None where the clock was never set."""
    if not EARLIEST_CLOCK_UNIX_S <= clock_unix_s <= LATEST_CLOCK_UNIX_S:
        return None
    return (clock_unix_s + _MONDAY_S) % (7 * DAY_S)
