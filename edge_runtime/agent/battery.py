"""What this device's battery holds when it is full, by its gauge."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_WATT_HOURS = (0.5, 5000.0)  # what can be believed; less than a factor of 10^6, so the unit shows
_MICRO, _MILLI = 1e-6, 1e-3
_VOLTAGES = ("voltage_min_design", "voltage_now")


def battery_wh(root: Path) -> float | None:
    """Watt-hours of all batteries that feed this machine, full; None where no gauge says so.

    The kernel promises microwatt-hours, or microampere-hours and microvolts; some drivers give thousandths instead.
    """
    found = [_capacity_wh(folder) for folder in sorted((root / "sys/class/power_supply").glob("*")) if _feeds(folder)]
    known = [value for value in found if value is not None]
    return sum(known) if known and len(known) == len(found) else None


def _feeds(folder: Path) -> bool:
    """Whether it is a battery of the machine, not of its mouse."""
    return _text(folder / "type") == "Battery" and _text(folder / "scope") != "Device"


def _capacity_wh(folder: Path) -> float | None:
    energy = _first(folder, ("energy_full", "energy_full_design"))
    if energy is not None:
        return _believed(energy * _MICRO, energy * _MILLI)
    charge, volts = _first(folder, ("charge_full", "charge_full_design")), _first(folder, _VOLTAGES)
    if charge is None or volts is None:
        return None
    volts *= _MICRO if volts >= 1e5 else _MILLI
    return _believed(charge * _MICRO * volts, charge * _MILLI * volts)


def _believed(*candidates: float) -> float | None:
    return next((value for value in candidates if _WATT_HOURS[0] <= value <= _WATT_HOURS[1]), None)


def _first(folder: Path, names: tuple[str, ...]) -> float | None:
    for name in names:
        try:
            value = float(_text(folder / name))
        except ValueError:
            continue
        if value > 0:
            return value
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # some drivers list files that refuse to be read
        return ""
