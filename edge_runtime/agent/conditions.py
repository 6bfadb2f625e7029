"""What this device knows of itself: measured, told by a file, or remembered from earlier jobs; the shell around it.

It reads sensors, files and clocks, and keeps one small file (``device.memory``) with what the next start needs: usage
of day and month, the table of availability, rates of steps and link. It is written after jobs, once an hour, and when a
megabyte went over the link, never more often than once a minute without a job: flash memory wears.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from edge_runtime import telemetry
from edge_runtime.agent.availability import Availability
from edge_runtime.agent.battery import battery_wh
from edge_runtime.agent.hours import local_time
from edge_runtime.agent.limits import MB, Known, Rate, held
from edge_runtime.agent.radio import metered_by, radio_of
from edge_runtime.agent.rates import StepRates, Throughput
from edge_runtime.agent.telemetry_file import NOTHING, TelemetryFile
from edge_runtime.agent.usage import Usage
from edge_runtime.errors import StorageError
from edge_runtime.files import write_durably
from edge_runtime.heartbeat import heartbeat_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.agent.hours import LocalTime
    from edge_runtime.agent.limits import Decline
    from edge_runtime.messages import EnergyUse, Heartbeat, Telemetry
    from edge_runtime.transport.link import Link

log = logging.getLogger("edge.agent")

FRESH_S = 1.0  # how long a measurement serves: the CPU's load is measured since the last one
SAVE_S, SAVE_LEAST_S, SAVE_BYTES = 3600.0, 60.0, 1_000_000
_FILE = "device.memory"
_T = TypeVar("_T")


class _Memory(msgspec.Struct, kw_only=True):
    v: Literal[1] = 1
    usage: Usage = msgspec.field(default_factory=Usage)
    rates: StepRates = msgspec.field(default_factory=StepRates)
    availability: bytes = b""
    saved_unix_s: float | None = None  # by a clock that could be believed
    up_kbit_s: float | None = None
    down_kbit_s: float | None = None


class Conditions:
    """What is known, at any moment. Not for several threads.

    Args:
        config: limits, and where figures come from.
        clock: unix time in seconds, as the device has it.
        monotonic: seconds, by a clock that nobody sets.
        root: below which files of the system are looked up.
        synchronised: whether something keeps ``clock`` right; None: unknown.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        root: Path,
        synchronised: Callable[[], bool | None] = telemetry.clock_synchronised,
    ) -> None:
        self._config, self._clock, self._monotonic, self._root = config, clock, monotonic, root
        self._synchronised = synchronised
        self._path = Path(config.state_dir) / _FILE
        self._memory = _read(self._path)
        self._availability = Availability(self._memory.availability)
        self.up = Throughput(self._memory.up_kbit_s)
        self.down = Throughput(self._memory.down_kbit_s)
        self._file = TelemetryFile(config.telemetry.file)
        self._told = self._told_last = NOTHING
        self._started_s = time.monotonic()
        self._measured: Telemetry | None = None
        self._measured_s = self._ticked_s = self._saved_s = self._began_s = monotonic()
        self._off_since_unix_s = self._memory.saved_unix_s  # until it is counted as time in which nothing could be done
        self._link_bytes, self._unsaved_bytes = (0, 0), 0
        self._battery_wh = config.energy.battery_wh or battery_wh(root)
        metered = config.link.metered
        self._metered = None if metered == "auto" else metered
        self.radio = radio_of(config.energy, None, root)

    @property
    def battery_wh(self) -> float | None:
        """What the battery holds when full."""
        return self._told.battery_wh or self._battery_wh

    def connected(self, local_host: str | None) -> None:
        """The link stands: what its interface says of it.

        Args:
            local_host: this end's address.
        """
        if self._config.link.metered == "auto":
            self._metered = metered_by(local_host, self._root)
        self.radio = radio_of(self._config.energy, local_host, self._root)

    def disconnected(self) -> None:
        """The connection ended: what was under way says nothing of the link."""
        self.up.stops()
        self.down.stops()

    def known(self, samples: dict[str, int], fetch_bytes: int | None = None) -> Known:
        """Everything that a decision may need, as it is now.

        Args:
            samples: by dataset.
            fetch_bytes: what would have to come for the job that is asked about.
        """
        measured, told = self._measure(), self._told
        told_rate = Rate(told.step_s, told.step_joules)
        rates = {} if told_rate != Rate() else self._memory.rates.all()
        return Known(
            battery_percent=measured.battery_percent,
            on_external_power=measured.on_external_power,
            battery_wh=self.battery_wh,
            temperature_c=measured.temperature_c,
            free_memory_bytes=measured.free_memory_bytes,
            link_metered=_first(told.link_metered, self._metered),
            up_kbit_s=_first(told.up_kbit_s, self.up.kbit_s),
            down_kbit_s=_first(told.down_kbit_s, self.down.kbit_s),
            joules_per_mb_up=self.radio.joules_per_mb_up,
            joules_per_mb_down=self.radio.joules_per_mb_down,
            rates=rates,
            rate=told_rate,
            samples=samples,
            fetch_bytes=fetch_bytes,
            joules_today=self._memory.usage.day.used,
            month_bytes=int(self._memory.usage.month.used),
            local=local_time(self._clock()),
        )

    def held(self) -> Decline | None:
        """The owner's limit that forbids training now."""
        return held(self.known({}), self._config.limits)

    def told_anew(self) -> bool:
        """Whether the telemetry file says something else than at the last heartbeat."""
        return self._told != self._told_last

    def heartbeat(self) -> Heartbeat:
        """What to say of all this."""
        limits, usage, bundle = self._config.limits, self._memory.usage, self._memory.rates.last
        known = self.known({})
        rate, limit = known.rate_of(bundle), held(known, limits)
        self._told_last = self._told
        predicted = None if known.local is None else self._availability.predict(known.local.week_second)
        told_percent = self._told.availability_percent
        joules, data_mb = limits.joules_per_day, limits.data_mb_per_month
        return heartbeat_of(
            self._measure(),
            declines="" if limit is None else limit.limit,
            max_temperature_c=limits.max_temperature_c,
            reserve_percent=limits.battery_reserve_percent,
            link_metered=known.link_metered,
            up_kbit_s=known.up_kbit_s,
            down_kbit_s=known.down_kbit_s,
            bundle_sha256=bundle,
            step_s=rate.step_s,
            step_joules=rate.step_joules,
            availability=predicted if told_percent is None else told_percent / 100.0,
            data_left_bytes=None if data_mb is None else data_mb * MB - usage.month.used,
            joules_left=None if joules is None else joules - usage.day.used,
        )

    def tick(self, link: Link, *, could: bool) -> None:
        """Some seconds have passed.

        Args:
            link: counts its bytes.
            could: whether a job would come, and be taken, now.
        """
        now, clock = self._monotonic(), self._clock()
        local = local_time(clock)
        self._count_off(clock, local)
        self._memory.usage.passed(local, now - self._ticked_s)
        self._ticked_s = now
        counted = (link.sent_bytes, link.received_bytes)
        moved = sum(counted) - sum(self._link_bytes)
        self._link_bytes = counted
        self._memory.usage.moved(moved)
        self._unsaved_bytes += moved
        self._availability.seen(clock, None if local is None else local.week_second, could)
        waited_s = now - self._saved_s
        if waited_s >= SAVE_S or (waited_s >= SAVE_LEAST_S and self._unsaved_bytes >= SAVE_BYTES):
            self.save()

    def joules_left(self) -> float | None:
        """Of the owner's limit for this day, that a sensor is to watch; None: there is none.

        Where the telemetry file says what a step draws, that is what counts for the day, whatever a sensor says: jobs
        that would draw more than is left are declined.
        """
        limit = None if self._told.step_joules is not None else self._config.limits.joules_per_day
        return None if limit is None else max(0.0, limit - self._memory.usage.day.used)

    def worked(self, bundle: str, steps: int, train_s: float, use: EnergyUse | None) -> None:
        """A job ended.

        Args:
            bundle: SHA-256.
            steps: that it trained; 0: none, or unknown.
            train_s: for them.
            use: what it drew; None if unknown.
        """
        told_joules = self._told.step_joules
        if told_joules is not None:
            self._memory.usage.drew(steps * told_joules)
        elif use is not None:
            parts = (use.train_mj, use.compress_mj, use.other_mj, use.radio_mj)
            self._memory.usage.drew(1e-3 * sum(part for part in parts if part is not None))
        train_mj = None if use is None or use.doubtful else use.train_mj
        self._memory.rates.trained(bundle, steps, train_s, None if train_mj is None else 1e-3 * train_mj)
        self.save()

    def doubt(self, bundle: str) -> None:
        """A job with this bundle was declined by what a step took."""
        self._memory.rates.doubted(bundle)

    def save(self) -> None:
        """Writes what the next start needs; where that fails it is tried again later."""
        self._saved_s, self._unsaved_bytes = self._monotonic(), 0
        self._memory.availability = self._availability.pack()
        clock = self._clock()
        self._memory.saved_unix_s = clock if self._is_believed(local_time(clock)) else None
        self._memory.up_kbit_s, self._memory.down_kbit_s = self.up.kbit_s, self.down.kbit_s
        try:
            write_durably(self._path, msgspec.msgpack.encode(self._memory))
        except StorageError as error:
            log.error("%s", error)  # noqa: TRY400 - one line, the user's disk is full

    def _is_believed(self, local: LocalTime | None) -> bool:
        """Not a clock that was never set, nor one that goes on from where it stood when the device went off."""
        return local is not None and self._synchronised() is not False

    def _count_off(self, clock: float, local: LocalTime | None) -> None:
        """Once, as soon as the clock can be believed: between the last save and the start this device was off."""
        if self._off_since_unix_s is None or local is None or not self._is_believed(local):
            return
        ran_s = self._monotonic() - self._began_s
        off_s = clock - ran_s - self._off_since_unix_s
        self._off_since_unix_s = None
        if off_s > 0.0:
            self._availability.was_off(local.week_second - ran_s, off_s)

    def _measure(self) -> Telemetry:
        """What is measured now, with what the file says in its place."""
        now = self._monotonic()
        if self._measured is None or now - self._measured_s >= FRESH_S:
            self._measured, self._measured_s = telemetry.measure(self._started_s, *self._link_bytes), now
        self._told = told = self._file.read()
        measured = self._measured
        if told is NOTHING:
            return measured
        free = told.free_memory_bytes
        return msgspec.structs.replace(
            measured,
            battery_percent=_first(told.battery_percent, measured.battery_percent),
            on_external_power=_first(told.on_external_power, measured.on_external_power),
            temperature_c=_first(told.temperature_c, measured.temperature_c),
            free_memory_bytes=measured.free_memory_bytes if free is None else int(free),
        )


def _read(path: Path) -> _Memory:
    try:
        found = msgspec.msgpack.decode(path.read_bytes(), type=_Memory)
    except FileNotFoundError:
        return _Memory()
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s: cannot be read (%s); usage and rates are counted anew", path, error)
        return _Memory()
    return found


def _first(told: _T | None, otherwise: _T | None) -> _T | None:
    return otherwise if told is None else told
