"""Batteries of laptops, phones and boards: what leaves them while nothing charges them.

The kernel promises microwatts, microvolts, microamperes and microampere-hours; some drivers of phones give milliamperes
and milliampere-hours instead, and signs differ. The promised unit is believed if the machine can draw that much, a
thousand times larger one if only that can be, and nothing else. Gauges change every few seconds to once a minute: good
for runs of minutes, and coarse.
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
_WATT_HOURS = (1.0, 2000.0)  # what a full battery holds
_JOULES_PER_WATT_HOUR = 3600.0
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
            return abs(power) * self._scale("POWER_NOW", abs(power), _WATTS, "W")
        current = self._number(fields, "CURRENT_NOW")
        if not current:
            return 0.0
        volts = self._volts(fields)
        return abs(current) * volts * self._scale("CURRENT_NOW", abs(current) * volts, _WATTS, "W")

    def _joules(self, fields: Mapping[str, str]) -> float:
        for key in ("ENERGY", "CHARGE"):
            left = self._number(fields, f"{key}_NOW")
            full = self._number(fields, f"{key}_FULL") or self._number(fields, f"{key}_FULL_DESIGN")
            if left is not None and full and 0 <= left <= 1.2 * full:
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

    def _scale(self, key: str, value: float, possible: tuple[float, float], unit: str) -> float:
        """1e-6, or 1e-3 where only that can be; decided at the first reading."""
        if key not in self._scales:
            low, high = possible
            fitting = [scale for scale in (1e-6, 1e-3) if low <= value * scale <= high]
            if not fitting:
                message = (
                    f"{NAME}: {self.name} gives {key} in a unit that cannot be told: {value * 1e-6:g} or "
                    f"{value * 1e-3:g} {unit}; {_CURE}"
                )
                raise SensorError("implausible", message)
            self._scales[key] = fitting[0]
        return self._scales[key]

    def _number(self, fields: Mapping[str, str], key: str) -> int | None:
        try:
            return int(fields[key]) if key in fields else None
        except ValueError as error:
            message = f"{NAME}: {self.name} gives {fields[key][:20]!r} as {key}, no whole number; {_CURE}"
            raise SensorError("implausible", message) from error


class Batteries:
    """All batteries of this machine, together."""

    slow = True  # the controller behind an ACPI battery takes its time

    def __init__(self, gauges: list[Gauge]) -> None:
        self.source = Source(NAME, "board", "coarse", _COVERS)
        self.domain: Domain = "system"
        self.interval_s = INTERVAL_S
        self.rails = tuple(Rail(gauge.name, "board", gauge.unit, limit_watts=_LIMIT_WATTS) for gauge in gauges)
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
