"""Jetson boards: INA3221 power monitors as the kernel's hwmon shows them (JetPack 5 and later).

A chip has three channels with a label, millivolts and milliamperes. Their numbers in hwmon change from boot to boot, so
they are known by label. A board with a rail that feeds all others (``VIN``, ``VDD_IN``, ``POM_5V_IN``) is measured by
that one alone; AGX boards have none, and the sum of their rails is the module without its carrier board.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from energy.errors import SensorError
from energy.sensors._files import KernelFile, close_all, look, look_number, watts_within
from energy.sensors.base import Domain, Rail, Scope, Sensor, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "jetson"
TOTALS = ("VIN", "VDD_IN", "POM_5V_IN")  # best first; each feeds all other rails of the module
INTERVAL_S = 0.1  # the chip converts every 13 ms; slower is as good over seconds and costs less on the I2C bus

_CHANNELS = (1, 2, 3)  # in4 to in6 are the voltages of the shunts, in7 and curr4 are sums
LIMIT_WATTS = 200.0  # of a module, or of one of its rails; an AGX Orin is made for 60 W
_OFFSET_WATTS = 0.25  # 80 uV offset over 2 mOhm at 5 V: an unused rail may read that much below 0


class Channel(NamedTuple):
    """One rail: ``factors`` are read and multiplied, and ``scale`` makes watts of that."""

    label: str
    factors: Sequence[KernelFile]
    scale: float

    def watts(self) -> float:
        """Power now."""
        value = self.scale
        for file in self.factors:
            value *= file.number()
        return value


class RailSensor:
    """Rails of a module, and which of them are its total; more than ``limit_watts`` of any is implausible."""

    def __init__(
        self, channels: Sequence[Channel], totals: Sequence[str], source: Source, *, limit_watts: float = LIMIT_WATTS
    ) -> None:
        self.source = source
        self.domain: Domain = "system"
        self.interval_s = INTERVAL_S
        self.rails = tuple(
            Rail(
                channel.label,
                source.scope if channel.label in totals and len(totals) == 1 else "rail",
                "watts",
                in_total=channel.label in totals,
                limit_watts=limit_watts,
            )
            for channel in channels
        )
        self._channels = tuple(channels)
        self._limit_watts = limit_watts

    def read(self) -> tuple[float, ...]:
        """Watts of every rail; see :class:`energy.sensors.base.Sensor`."""
        values = tuple(self._checked(channel, rail) for channel, rail in zip(self._channels, self.rails, strict=True))
        total = sum(value for value, rail in zip(values, self.rails, strict=True) if rail.in_total)
        watts_within(total, self._limit_watts, f"{self.source.sensor}: the total")
        return values

    def close(self) -> None:
        """Closes the files."""
        close_all(file for channel in self._channels for file in channel.factors)

    def _checked(self, channel: Channel, rail: Rail) -> float:
        watts = channel.watts()
        if -_OFFSET_WATTS <= watts <= 0 and rail.scope == "rail":
            return 0.0  # nothing flows, within what the chip can tell
        return watts_within(watts, rail.limit_watts, f"{self.source.sensor}: {channel.label}")


def probe(root: Path = Path("/")) -> list[Sensor]:
    """The module's INA3221 chips.

    Raises:
        SensorError: there are none, or they cannot be read.
    """
    channels = hwmon_channels(root, NAME)
    if not channels:
        raise SensorError(
            "absent", "jetson: no INA3221 in hwmon with labelled rails; Jetsons with JetPack 5 or later have"
        )
    return [made(channels, NAME)]


def made(channels: Sequence[Channel], name: str) -> RailSensor:
    """A sensor that was read once: by its total rail if it has one, else by the sum of its rails.

    Raises:
        SensorError: it cannot be read, or what it says is no power of a running machine.
    """
    labels = [channel.label for channel in channels]
    total = next((label for label in TOTALS if label in labels), None)
    if total:
        covers = f"the whole module, at its input {total}; not the carrier board and what is plugged into it"
    else:
        covers = (
            f"sum of the module's rails {', '.join(labels)}; module only: losses of its regulators, the carrier board "
            "and what is plugged into it are not in it"
        )
    return tried(RailSensor(channels, [total] if total else labels, source(name, "module", covers)))


def source(name: str, scope: Scope, covers: str) -> Source:
    """Source of a sensor that reads power."""
    return Source(name, scope, "power", covers)


def tried(sensor: RailSensor) -> RailSensor:
    """The sensor after a real read; closed if that fails.

    Raises:
        SensorError: as :meth:`RailSensor.read`.
    """
    try:
        sensor.read()
    except SensorError:
        sensor.close()
        raise
    return sensor


def hwmon_channels(root: Path, name: str) -> list[Channel]:
    """Labelled channels of all INA3221 chips in hwmon, by chip and number; nothing is opened yet."""
    channels: list[Channel] = []
    for chip in chips(root, "ina3221", "hwmon"):
        for number in _CHANNELS:
            label = look(chip / f"in{number}_label")
            if label and label.upper() != "NC" and look_number(chip / f"in{number}_enable") != 0:
                factors = [KernelFile(chip / f"{kind}{number}_input", name) for kind in ("in", "curr")]
                channels.append(Channel(unique(label, channels), factors, 1e-6))  # mV and mA
    return channels


def chips(root: Path, kind: str, subsystem: str) -> Iterator[Path]:
    """Folders of every chip of this kind in ``hwmon`` or ``iio``, each once, in the order of their I2C addresses.

    Drivers and buses are asked first, since the numbers in ``/sys/class`` are not stable; some trees have only those.
    """
    entry = {"hwmon": "hwmon[0-9]*", "iio": "iio:device*"}[subsystem]
    devices = [
        device for driver in (kind, kind + "x") for device in sorted(root.glob(f"sys/bus/i2c/drivers/{driver}/*"))
    ]
    named = sorted(root.glob("sys/bus/i2c/devices/*-00[4-7]?"))
    listed = sorted(root.glob(f"sys/class/hwmon/{entry}" if subsystem == "hwmon" else f"sys/bus/iio/devices/{entry}"))
    seen: set[Path] = set()
    for folder in (
        *(inner for device in devices for inner in _below(device, subsystem, entry)),
        *(inner for device in named for inner in _below(device, subsystem, entry) if _is(inner, kind)),
        *(inner for inner in listed if _is(inner, kind)),
    ):
        real = folder.resolve()
        if real not in seen:
            seen.add(real)
            yield folder


def unique(label: str, channels: Sequence[Channel]) -> str:
    """The label, with a number behind it if another channel bears it already."""
    count = sum(channel.label.split(" #")[0] == label for channel in channels)
    return f"{label} #{count + 1}" if count else label


def _below(device: Path, subsystem: str, entry: str) -> list[Path]:
    return sorted({*device.glob(f"{subsystem}/{entry}"), *device.glob(entry)})


def _is(folder: Path, kind: str) -> bool:
    return (look(folder / "name") or "").startswith(kind)
