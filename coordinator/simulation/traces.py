"""What virtual devices are like: speed, power, battery, link and presence, as three files of JSON lines.

``devices.jsonl`` holds a :class:`DeviceTrace` a line, ``links.jsonl`` a :class:`LinkTrace`, ``presence.jsonl`` a
:class:`PresenceTrace`. Devices name the link and the presence that they follow, each from an offset of its own, so a
few recorded traces serve a large fleet. Watts and joules are those of a device model, not measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import msgspec

from coordinator.simulation.owner import HeatTrace, OwnerLimits
from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.messages import Name
from edge_runtime.toml_errors import explained

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICES_FILE, LINKS_FILE, PRESENCE_FILE = "devices.jsonl", "links.jsonl", "presence.jsonl"
CAP_S = 30 * 86_400.0  # no transfer takes longer: a link without any rate is as good as one that takes a month
MAX_LINES = 2_000_000
MAX_LINE_BYTES = 16 * 1024 * 1024

_TICKS = 1024  # of a second: sums of such times are exact, so no change of presence is ever passed over

_Amount: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
_Percent: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=100.0)]
_Rates: TypeAlias = Annotated[list[_Amount], msgspec.Meta(min_length=1, max_length=200_000)]
_Spans: TypeAlias = Annotated[list[tuple[_Amount, _Amount]], msgspec.Meta(max_length=100_000)]
_Period: TypeAlias = Annotated[float, msgspec.Meta(gt=0.0, le=1e9)]


class DeviceTrace(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """One device.

    A training step takes ``slowdown`` times the reference device's seconds and ``training_watts`` above idle, from the
    device model; bytes take ``radio_joules_per_mb_up`` and ``_down`` (MB are 10^6 bytes). ``battery_wh`` None: it is on
    mains. ``reserve_percent`` is what its owner wants left. While it charges it gains ``charge_watts``. Offsets say
    where in its traces the device is at the start. ``samples`` is the number of its training samples where no data is
    given; None: what the simulation says. ``limits`` are those of its owner; ``metered``: whether every byte of its
    link is paid for, None: unknown; ``heat``: how warm it gets, None: nothing measures that.
    """

    device: Name
    slowdown: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    training_watts: _Amount = 0.0
    idle_watts: _Amount = 0.0
    radio_joules_per_mb_up: _Amount = 0.0
    radio_joules_per_mb_down: _Amount = 0.0
    battery_wh: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] | None = None
    battery_percent: _Percent = 100.0
    reserve_percent: _Percent = 0.0
    charge_watts: _Amount = 0.0
    link: Name
    link_offset_s: _Amount = 0.0
    presence: Name
    presence_offset_s: _Amount = 0.0
    memory_mb: Annotated[int, msgspec.Meta(ge=1)] = 1024
    samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    limits: OwnerLimits | None = None
    metered: bool | None = None
    heat: HeatTrace | None = None

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "presence_offset_s", _in_ticks(self.presence_offset_s))


class LinkTrace(msgspec.Struct, frozen=True, kw_only=True, dict=True, forbid_unknown_fields=True):
    """Rates of a link, piecewise constant: ``up_kbit_s[i]`` from ``times_s[i]`` on; all repeats after ``period_s``.

    ``round_trip_s`` is added to every transfer.
    """

    name: Name
    times_s: _Rates
    up_kbit_s: _Rates
    down_kbit_s: _Rates
    period_s: _Period
    round_trip_s: _Amount = 0.0

    def __post_init__(self) -> None:
        if not len(self.times_s) == len(self.up_kbit_s) == len(self.down_kbit_s):
            raise ValueError(f"link {self.name!r}: times_s, up_kbit_s and down_kbit_s must be equally long")
        if self.times_s[0] != 0.0 or not _ascending([*self.times_s, self.period_s]):
            raise ValueError(f"link {self.name!r}: times_s must begin with 0 and ascend, all below period_s")

    def transfer_s(self, start_s: float, size_bytes: float, *, up: bool) -> float:
        """Seconds that ``size_bytes`` take from ``start_s`` on (of the trace: offset included), at most ``CAP_S``."""
        rates, delivered = self._up if up else self._down
        period, total = self.period_s, delivered[-1]
        if size_bytes <= 0.0:
            return self.round_trip_s
        if size_bytes * period >= total * CAP_S:
            return CAP_S
        phase = start_s % period
        at = bisect_right(self.times_s, phase) - 1
        wanted = delivered[at] + rates[at] * (phase - self.times_s[at]) + size_bytes
        periods = max(math.ceil(wanted / total) - 1, 0)
        rest = min(max(wanted - periods * total, 0.0), total)
        span = max(bisect_left(delivered, rest) - 1, 0)  # the earliest moment at which the rest is there
        end = self.times_s[span] + ((rest - delivered[span]) / rates[span] if rates[span] else 0.0)
        return min(max(periods * period + end - phase, 0.0) + self.round_trip_s, CAP_S)

    def rate_kbit_s(self, at_s: float, *, up: bool) -> float:
        """The rate at a moment of the trace."""
        return (self.up_kbit_s if up else self.down_kbit_s)[bisect_right(self.times_s, at_s % self.period_s) - 1]

    @cached_property
    def _up(self) -> tuple[list[float], list[float]]:
        return self._delivered(self.up_kbit_s)

    @cached_property
    def _down(self) -> tuple[list[float], list[float]]:
        return self._delivered(self.down_kbit_s)

    def _delivered(self, kbit_s: list[float]) -> tuple[list[float], list[float]]:
        """Bytes per second, and the bytes delivered since the period's begin at every time and at its end."""
        rates = [rate * 125.0 for rate in kbit_s]
        ends = [*self.times_s[1:], self.period_s]
        amounts = (rate * (end - begin) for rate, begin, end in zip(rates, self.times_s, ends, strict=True))
        return rates, [0.0, *accumulate(amounts)]


class PresenceTrace(msgspec.Struct, frozen=True, kw_only=True, dict=True, forbid_unknown_fields=True):
    """When a device is online, and when it charges: spans ``[from, to)`` in seconds; all repeats after ``period_s``.

    Times are rounded to 1/1024 s.
    """

    name: Name
    online: _Spans
    charging: _Spans = []
    period_s: _Period

    def __post_init__(self) -> None:
        period = _in_ticks(self.period_s)
        msgspec.structs.force_setattr(self, "period_s", period)
        for key in ("online", "charging"):
            spans = [(_in_ticks(begin), _in_ticks(end)) for begin, end in getattr(self, key)]
            msgspec.structs.force_setattr(self, key, spans)
            ends = [0.0, *(time for span in spans for time in span), period]
            empty = any(begin == end for begin, end in spans)
            if empty or any(later < earlier for earlier, later in pairwise(ends)):
                raise ValueError(
                    f"presence {self.name!r}: {key} must be spans [from, to] that ascend and lie within period_s"
                )

    def online_at(self, at_s: float) -> bool:
        """Whether it is online at a moment of the trace (offset included)."""
        return bool(bisect_right(self._online, at_s % self.period_s) & 1)

    def charging_at(self, at_s: float) -> bool:
        """Whether it charges at a moment of the trace."""
        return bool(bisect_right(self._charging, at_s % self.period_s) & 1)

    def next_change_s(self, at_s: float) -> float:
        """The first moment after ``at_s`` at which it comes, leaves, or begins or ends charging; inf: there is none."""
        changes = self._changes
        if not changes:
            return math.inf
        phase = at_s % self.period_s
        following = bisect_right(changes, phase)
        base = at_s - phase
        return base + (changes[following] if following < len(changes) else self.period_s + changes[0])

    @cached_property
    def _online(self) -> list[float]:
        return [time for span in self.online for time in span]

    @cached_property
    def _charging(self) -> list[float]:
        return [time for span in self.charging for time in span]

    @cached_property
    def _changes(self) -> list[float]:
        """Moments of a period at which something changes; spans that touch, also across its end, are one."""
        found: set[float] = set()
        for ends in (self._online, self._charging):
            times = Counter(0.0 if time == self.period_s else time for time in ends)
            found.update(time for time, count in times.items() if count == 1)
        return sorted(found)


class Traces(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet; every link and presence that a device names is there."""

    devices: list[DeviceTrace]
    links: dict[str, LinkTrace]
    presences: dict[str, PresenceTrace]

    def resized(self, count: int) -> Traces:
        """The first ``count`` devices; where there are fewer, they come again, by other names and at other offsets."""
        devices = self.devices[:count]
        while len(devices) < count:
            lap, index = divmod(len(devices), len(self.devices))
            one = self.devices[index]
            shift = (lap * 0.618_033_988_75) % 1.0
            link, presence = self.links[one.link].period_s, self.presences[one.presence].period_s
            devices.append(
                msgspec.structs.replace(
                    one,
                    device=f"{one.device[:52]}-{lap + 1}",
                    link_offset_s=(one.link_offset_s + shift * link) % link,
                    presence_offset_s=(one.presence_offset_s + shift * presence) % presence,
                )
            )
        return Traces(devices=devices, links=self.links, presences=self.presences)


_T = TypeVar("_T", DeviceTrace, LinkTrace, PresenceTrace)
_Named = TypeVar("_Named", LinkTrace, PresenceTrace)


def read_traces(folder: Path) -> Traces:
    """Reads the three files of a folder.

    Raises:
        ConfigError: a file is missing, a line is no JSON or no such trace, or a name is missing or there twice; the
            message names file and line.
    """
    links = _by_name(folder / LINKS_FILE, LinkTrace)
    presences = _by_name(folder / PRESENCE_FILE, PresenceTrace)
    devices: dict[str, DeviceTrace] = {}
    for place, device in _lines(folder / DEVICES_FILE, DeviceTrace):
        if device.device in devices:
            raise ConfigError(f"{place}: device {device.device!r} is there twice")
        for name, known, file in (
            (device.link, links, LINKS_FILE),
            (device.presence, presences, PRESENCE_FILE),
        ):
            if name not in known:
                raise ConfigError(f"{place}: no trace {name!r} in {file}")
        devices[device.device] = device
    if not devices:
        raise ConfigError(f"{folder / DEVICES_FILE}: holds no device")
    return Traces(devices=list(devices.values()), links=links, presences=presences)


def write_traces(traces: Traces, folder: Path) -> None:
    """Writes the three files into ``folder``, which is made if it is missing.

    Raises:
        StorageError: the folder cannot be written.
    """
    files: dict[str, list[Any]] = {
        DEVICES_FILE: list(traces.devices),
        LINKS_FILE: list(traces.links.values()),
        PRESENCE_FILE: list(traces.presences.values()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            with (folder / name).open("wb") as file:
                for line in lines:
                    file.write(msgspec.json.encode(line) + b"\n")
    except OSError as error:
        raise StorageError(f"{folder}: traces cannot be written ({error.strerror})") from error


def _by_name(path: Path, kind: type[_Named]) -> dict[str, _Named]:
    found: dict[str, _Named] = {}
    for place, trace in _lines(path, kind):
        if trace.name in found:
            raise ConfigError(f"{place}: trace {trace.name!r} is there twice")
        found[trace.name] = trace
    return found


def _lines(path: Path, kind: type[_T]) -> Iterator[tuple[str, _T]]:
    decoder = msgspec.json.Decoder(kind)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"{path}:{number}"
                if number > MAX_LINES or len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{place}: more than {MAX_LINES} lines, or a line of more than 16 MB")
                if line.isspace():
                    continue
                try:
                    yield place, decoder.decode(line)
                except msgspec.ValidationError as error:
                    raise ConfigError(f"{place}: {explained(str(error), kind)}") from error
                except msgspec.DecodeError as error:
                    raise ConfigError(f"{place}: is not valid JSON ({error})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _in_ticks(time_s: float) -> float:
    return round(time_s * _TICKS) / _TICKS


def _ascending(values: list[float]) -> bool:
    return all(earlier < later for earlier, later in pairwise(values))
