"""Batteries of laptops, phones and boards: what leaves them while nothing charges them.

The kernel promises microwatts, microvolts, microamperes and microampere-hours; some drivers of phones give milliamperes
and milliampere-hours instead, and signs differ. A reading that is only possible in the promised unit settles it. A low
one may as well be in a thousand times larger units, or the machine nearly at rest: then the size of the full battery
tells, and without it nothing is believed. Gauges change every few seconds to once a minute: good for runs of minutes,
and coarse.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from energy.errors import SensorError
from energy.sensors._files import KernelFile, close_all, watts_within
from energy.sensors.base import Domain, Rail, Sensor, Source, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "battery"
INTERVAL_S = 5.0

_LIMIT_WATTS = 300.0
_WATTS = (0.05, _LIMIT_WATTS)  # what a machine that runs draws
_VOLTS = (2.0, 80.0)
_WATT_HOURS = (1.0, 900.0)  # what a full battery holds; less than a factor of 1000, so the unit shows
_JOULES_PER_WATT_HOUR = 3600.0
_FROZEN_S = {"watts": 300.0, "joules": 1800.0}  # a phone at rest needs half an hour for 1 % of its battery
_MOST_OF_FULL = 1.2  # an old battery that was estimated too small
_MICRO, _MILLI = 1e-6, 1e-3
_LARGEST = 10**15  # beyond any unit
_RISE = 0.01  # of the capacity: more than that upward while discharging is no rounding
_COVERS = "the whole machine, display and radios too, as its battery gauge tells it; coarse, for runs of minutes"
_PREFIX = "POWER_SUPPLY_"
_CURE = "choose another sensor"


class Gauge:
    """One battery. Its figures become watts if it has any of power, else joules from what is left in it."""

    def __init__(self, name: str, file: KernelFile) -> None:
        self.name = name
        self.file = file
        self._scales: dict[str, float] = {}
        self._used_joules = 0.0
        self._left: float | None = None
        fields = self.fields()
        self.unit: Unit = "watts" if self._tells_power(fields) else "joules"

    def fields(self) -> dict[str, str]:
        """Everything the driver says, in one read."""
        lines = (line.partition("=") for line in self.file.text().splitlines())
        return {key.removeprefix(_PREFIX): value.strip() for key, _, value in lines}

    def value(self, fields: Mapping[str, str]) -> float:
        """Watts or joules of a battery that discharges."""
        if self.unit == "watts":
            return watts_within(self._watts(fields), _LIMIT_WATTS, f"{NAME}: {self.name}")
        return self._joules(fields)

    def resting(self) -> float:
        """Watts or joules of a battery that does not discharge while another one does."""
        return 0.0 if self.unit == "watts" else self._used_joules

    def _tells_power(self, fields: Mapping[str, str]) -> bool:
        power, current = self._number(fields, "POWER_NOW"), self._number(fields, "CURRENT_NOW")
        if fields.get("STATUS") != "Discharging":
            return power is not None or current is not None
        return bool(power) or bool(current)

    def _watts(self, fields: Mapping[str, str]) -> float:
        power = self._number(fields, "POWER_NOW")
        if power:
            return abs(power) * self._power_scale("POWER_NOW", abs(power), fields)
        current = self._number(fields, "CURRENT_NOW")
        if not current:
            return 0.0
        volts = self._volts(fields)
        return abs(current) * volts * self._power_scale("CURRENT_NOW", abs(current) * volts, fields)

    def _joules(self, fields: Mapping[str, str]) -> float:
        for key in ("ENERGY", "CHARGE"):
            left = self._number(fields, f"{key}_NOW")
            full = self._number(fields, f"{key}_FULL") or self._number(fields, f"{key}_FULL_DESIGN")
            if left is not None and full and 0 <= left <= _MOST_OF_FULL * full:
                volts = self._volts(fields) if key == "CHARGE" else 1.0
                scale = self._scale(key, full * volts, _WATT_HOURS, "Wh full")
                return self._taken(left, full, volts * scale * _JOULES_PER_WATT_HOUR)
        message = f"{NAME}: {self.name} gives neither power nor what is left of how much; {_CURE}"
        raise SensorError("unsupported", message)

    def _taken(self, left: float, full: float, joules_per_count: float) -> float:
        """Joules since the first reading; a gauge that rounds up for a while takes nothing back."""
        if self._left is None:
            self._left = left
        elif left > self._left + _RISE * full:
            raise SensorError("implausible", f"{NAME}: {self.name} discharges, and holds more than before; {_CURE}")
        elif left < self._left:
            self._used_joules += (self._left - left) * joules_per_count
            self._left = left
        return self._used_joules

    def _volts(self, fields: Mapping[str, str]) -> float:
        value = self._number(fields, "VOLTAGE_NOW")
        if not value:
            raise SensorError("unsupported", f"{NAME}: {self.name} does not tell its voltage; {_CURE}")
        return value * self._scale("VOLTAGE_NOW", value, _VOLTS, "V")

    def _power_scale(self, key: str, value: float, fields: Mapping[str, str]) -> float:
        """1e-6 or 1e-3; settled by a reading that can be nothing else, or by the size of the battery."""
        if key in self._scales:
            return self._scales[key]
        low, high = _WATTS
        fitting = [scale for scale in (_MICRO, _MILLI) if low <= value * scale <= high]
        if fitting != [_MICRO]:
            hint = self._unit_of_capacity(fields)
            if hint is None or hint not in fitting:
                why = "may rest now" if fitting else "cannot be"
                message = (
                    f"{NAME}: {self.name} gives {key} in a unit that cannot be told: {value * _MICRO:g} or "
                    f"{value * _MILLI:g} W {why}; try again while the machine works, or {_CURE}"
                )
                raise SensorError("implausible", message)
            fitting = [hint]
        self._scales[key] = fitting[0]
        return fitting[0]

    def _unit_of_capacity(self, fields: Mapping[str, str]) -> float | None:
        """1e-6 or 1e-3, as all that is said of the full battery agrees on; None if it does not, or nothing is said."""
        scales: set[float] = set()
        for kind in ("ENERGY", "CHARGE"):
            sizes = [self._number(fields, f"{kind}_{name}") for name in ("FULL", "FULL_DESIGN")]
            left = self._number(fields, f"{kind}_NOW")
            for size in sizes:
                if not size:
                    continue
                if left is not None and not 0 <= left <= _MOST_OF_FULL * size:
                    return None  # two units beside each other
                volts = self._volts(fields) if kind == "CHARGE" else 1.0
                scales |= {s for s in (_MICRO, _MILLI) if _WATT_HOURS[0] <= size * volts * s <= _WATT_HOURS[1]} or {0.0}
        return scales.pop() if len(scales) == 1 and 0.0 not in scales else None

    def _scale(self, key: str, value: float, possible: tuple[float, float], unit: str) -> float:
        """1e-6, or 1e-3 where only that can be; decided at the first reading."""
        if key not in self._scales:
            low, high = possible
            fitting = [scale for scale in (_MICRO, _MILLI) if low <= value * scale <= high]
            if not fitting:
                message = (
                    f"{NAME}: {self.name} gives {key} in a unit that cannot be told: {value * _MICRO:g} or "
                    f"{value * _MILLI:g} {unit}; {_CURE}"
                )
                raise SensorError("implausible", message)
            self._scales[key] = fitting[0]
        return self._scales[key]

    def _number(self, fields: Mapping[str, str], key: str) -> int | None:
        if key not in fields:
            return None
        try:
            number = int(fields[key])
        except ValueError:
            number = _LARGEST
        if abs(number) >= _LARGEST:
            message = f"{NAME}: {self.name} gives {fields[key][:20]!r} as {key}, no number that can be; {_CURE}"
            raise SensorError("implausible", message)
        return number


class Batteries:
    """All batteries of this machine, together. ``frozen_s``: its figures move at least that often while discharging."""

    slow = True  # the controller behind an ACPI battery takes its time

    def __init__(self, gauges: list[Gauge]) -> None:
        self.source = Source(NAME, "board", "coarse", _COVERS)
        self.domain: Domain = "system"
        self.interval_s = INTERVAL_S
        self.rails = tuple(Rail(gauge.name, "board", gauge.unit, limit_watts=_LIMIT_WATTS) for gauge in gauges)
        self.frozen_s = max(_FROZEN_S[gauge.unit] for gauge in gauges)
        self._gauges = tuple(gauges)

    def read(self) -> tuple[float, ...]:
        """Watts, or joules since the first reading; see :class:`energy.sensors.base.Sensor`."""
        told = [gauge.fields() for gauge in self._gauges]
        statuses = {fields.get("STATUS", "Unknown") for fields in told}
        if "Discharging" not in statuses or "Charging" in statuses:
            message = (
                f"{NAME}: {', '.join(sorted(statuses)).lower()}, so the battery does not feed this machine alone; "
                "unplug it to measure by its battery"
            )
            raise SensorError("unsupported", message)
        return tuple(
            gauge.value(fields) if fields.get("STATUS") == "Discharging" else gauge.resting()
            for gauge, fields in zip(self._gauges, told, strict=True)
        )

    def close(self) -> None:
        """Closes the files."""
        close_all(gauge.file for gauge in self._gauges)


def probe(root: Path = Path("/")) -> list[Sensor]:
    """The batteries that feed this machine; those of mice and headsets are left out.

    Raises:
        SensorError: there are none, they are not in use, or their units cannot be told.
    """
    gauges = []
    for path in sorted(root.glob("sys/class/power_supply/*/uevent")):
        gauge = Gauge(path.parent.name, KernelFile(path, NAME))
        fields = gauge.fields()
        if fields.get("TYPE") == "Battery" and fields.get("SCOPE") != "Device" and fields.get("PRESENT") != "0":
            gauges.append(gauge)
    if not gauges:
        raise SensorError("absent", f"{NAME}: this machine has no battery")
    sensor = Batteries(gauges)
    sensor.read()
    return [sensor]
