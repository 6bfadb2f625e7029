"""How hot a machine is: the hottest zone that can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.sensors._files import look, look_number

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_PLAUSIBLE_C = (-40.0, 150.0)
_FIXED_ZONES = ("pmicdie",)  # Jetsons show a constant 100 degrees there
_PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


def hottest_c(root: Path) -> float | None:
    """Degrees Celsius of the hottest zone below ``root``; None where none can be read.

    Constants, absurd values and zones that refuse to be read now (a GPU asleep) are left out. Without a zone (AMD
    processors have none) the chips of processors count, and without these any other chip that measures a temperature.
    """
    zones = (zone for zone in root.glob("sys/class/thermal/thermal_zone*") if not _is_fixed(look(zone / "type")))
    hottest = _hottest(zone / "temp" for zone in zones)
    if hottest is not None:
        return hottest
    chips = [(look(chip / "name"), chip) for chip in root.glob("sys/class/hwmon/hwmon*")]
    for processor in (True, False):
        hottest = _hottest(
            path
            for name, chip in chips
            if (name in _PROCESSORS) is processor and not _is_fixed(name)
            for path in chip.glob("temp*_input")
        )
        if hottest is not None:
            return hottest
    return None


def _hottest(paths: Iterable[Path]) -> float | None:
    values = (value / 1000 for value in map(look_number, paths) if value is not None and abs(value) < 1e6)
    return max((value for value in values if _PLAUSIBLE_C[0] <= value <= _PLAUSIBLE_C[1]), default=None)


def _is_fixed(name: str | None) -> bool:
    return (name or "").lower().replace("-", "").replace("_", "") in _FIXED_ZONES
