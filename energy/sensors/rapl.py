"""RAPL: energy counters of Intel and AMD processors, as the kernel's powercap tree shows them.

``intel-rapl:N`` is a package, or ``psys`` (the platform); ``intel-rapl:N:M`` are parts of package N. The cores and the
graphics (``core``, ``uncore``) are inside the package's counter. ``dram`` is added: by Intel's manual (SDM vol. 3B,
power management, RAPL domains) the package is the processor die, and dram the memory beside it, a domain of its own.
``psys`` holds the packages and is never added to them: it is a second sensor, of the whole machine. The tree
``intel-rapl-mmio`` shows the same packages once more and is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from energy.errors import SensorError
from energy.sensors._files import KernelFile, close_all, look, look_number
from energy.sensors.base import Domain, Rail, Sensor, Source

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "rapl"
PLATFORM_NAME = "rapl-psys"
INTERVAL_S = 0.1  # the counters advance every millisecond, so 10 Hz is exact enough at the edges of a window

_CURE = (
    "energy_uj is for root alone since CVE-2020-8694: give a group read permission with a udev rule for "
    'SUBSYSTEM=="powercap", or give the process CAP_DAC_READ_SEARCH'
)
_COVERS = "CPU packages with their caches and built-in graphics"
_COVERS_PLATFORM = "the platform as its maker wired it to the CPU: packages, and more or less of the board"
_REST = "not disks, network, graphics cards, fans and power supply"
_CHECK_JOULES = 50.0  # the platform is compared with its packages once those have used so much


class Zone(NamedTuple):
    """One counter: its name, its file, and the joules at which it starts again from 0."""

    name: str
    counter: KernelFile
    wraps_at: float


class Counters:
    """Counters of packages and their parts, or of the platform."""

    def __init__(self, zones: Iterable[Zone], totals: set[str], source: Source, domain: Domain) -> None:
        self.source = source
        self.domain: Domain = domain
        self.interval_s = INTERVAL_S
        self._zones = tuple(zones)
        self.rails = tuple(
            Rail(
                zone.name,
                source.scope if zone.name in totals else "package" if _is_package(zone.name) else "rail",
                "joules",
                in_total=zone.name in totals,
                wraps_at=zone.wraps_at,
            )
            for zone in self._zones
        )
        self._grown = [0.0] * len(self._zones)
        self._last: tuple[float, ...] | None = None

    def read(self) -> tuple[float, ...]:
        """Joules of every counter; see :class:`energy.sensors.base.Sensor`."""
        values = tuple(self._joules(zone) for zone in self._zones)
        if self.domain == "system":
            self._compare(values)
        return values

    def close(self) -> None:
        """Closes the files."""
        close_all(zone.counter for zone in self._zones)

    def _joules(self, zone: Zone) -> float:
        joules = zone.counter.number() * 1e-6
        if not 0 <= joules <= zone.wraps_at:
            message = f"{self.source.sensor}: {zone.name} counts {joules:g} J, outside 0-{zone.wraps_at:g} J; see dmesg"
            raise SensorError("implausible", message)
        return joules

    def _compare(self, values: tuple[float, ...]) -> None:
        """A platform that uses less than the packages in it was never wired up by its maker."""
        if self._last is not None:
            for index, (now, before, rail) in enumerate(zip(values, self._last, self.rails, strict=True)):
                step = now - before
                self._grown[index] += step if step >= 0 else step + (rail.wraps_at or 0.0)
        self._last = values
        platform = self._grown[0]
        packages = sum(self._grown[1:])
        if packages >= _CHECK_JOULES:
            if platform < 0.9 * packages:
                message = (
                    f"{self.source.sensor}: the platform counted {platform:.1f} J while the packages in it counted "
                    f"{packages:.1f} J; its maker did not connect it, choose rapl"
                )
                raise SensorError("implausible", message)
            self._grown = [0.0] * len(self._zones)


def probe(root: Path = Path("/")) -> list[Sensor]:
    """Packages, and the platform where there is a counter of it.

    Raises:
        SensorError: there are none, they may not be read, or count nothing (virtual machines).
    """
    tree = root / "sys/class/powercap"
    tops = sorted((path for path in _entries(tree) if re.fullmatch(r"intel-rapl:\d+", path.name)), key=_number)
    names = {path: look(path / "name") or path.name for path in tops}
    packages = [path for path in tops if _is_package(names[path])]
    platforms = [path for path in tops if names[path].startswith("psys")]
    if not tops:
        raise SensorError(
            "absent", f"{NAME}: no intel-rapl below {tree}; x86 machines have it with the module intel_rapl_msr"
        )
    sensors: list[Sensor] = []
    try:
        if packages:
            zones, totals = _package_zones(packages, names)
            covers = f"{_COVERS}{', and their memory' if len(totals) > len(packages) else ''}; {_REST}"
            sensors.append(_tried(Counters(zones, totals, Source(NAME, "package", "counter", covers), "cpu")))
        if platforms:
            zones = [_zone(path, names[path], PLATFORM_NAME) for path in (platforms[0], *packages)]
            source = Source(PLATFORM_NAME, "package", "counter", f"{_COVERS_PLATFORM}; perhaps not graphics cards")
            platform = Counters(zones, {zones[0].name}, source, "system")
            if packages and _counts_nothing(zones[0]):
                platform.close()  # the zone is there and was never connected: no second sensor
            else:
                sensors.append(_tried(platform))
    except SensorError:
        for sensor in sensors:
            sensor.close()
        raise
    if not sensors:
        raise SensorError("unsupported", f"{NAME}: no package among {', '.join(names.values())}; choose another sensor")
    return sensors


def _package_zones(packages: list[Path], names: dict[Path, str]) -> tuple[list[Zone], set[str]]:
    zones: list[Zone] = []
    totals: set[str] = set()
    for path in packages:
        zones.append(_zone(path, names[path], NAME))
        totals.add(names[path])
        for inner in sorted((entry for entry in _entries(path) if entry.name.startswith(f"{path.name}:")), key=_number):
            kind = look(inner / "name") or inner.name
            zone = _zone(inner, f"{names[path]} {kind}", NAME)
            if _counts_nothing(zone):
                zone.counter.close()  # parts that this processor does not have, such as the graphics of a server
                continue
            zones.append(zone)
            if kind == "dram":
                totals.add(zone.name)
    return zones, totals


def _tried(sensor: Counters) -> Counters:
    try:
        values = sensor.read()
    except SensorError:
        sensor.close()
        raise
    for value, rail in zip(values, sensor.rails, strict=True):
        if rail.in_total and not value:
            sensor.close()
            message = (
                f"{sensor.source.sensor}: {rail.name} counts nothing, as in virtual machines; choose another sensor"
            )
            raise SensorError("unsupported", message)
    return sensor


def _counts_nothing(zone: Zone) -> bool:
    return zone.counter.number() == 0


def _zone(path: Path, name: str, sensor: str) -> Zone:
    largest = look_number(path / "max_energy_range_uj")
    if not largest or not 0 < largest < 1e18:
        raise SensorError("unsupported", f"{sensor}: {path} does not say where its counter wraps; update the kernel")
    return Zone(name, KernelFile(path / "energy_uj", sensor, _CURE), largest * 1e-6)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _number(path: Path) -> int:
    return int(path.name.rsplit(":", 1)[1])


def _is_package(name: str) -> bool:
    return name.startswith("package")
