"""Measurements as JSON and text. Keys that say ``modelled`` hold what was modelled, and only those do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from energy.metering.conditions import Conditions
    from energy.metering.measurement import Measurement
    from energy.sensors.base import Source


def source_json(source: Source | None) -> dict[str, Any] | None:
    """Sensor, scope, quality and what is covered."""
    return None if source is None else source._asdict()


def conditions_json(conditions: Conditions | None) -> dict[str, Any] | None:
    """Temperature, throttling, counters, clocks and mode."""
    if conditions is None:
        return None
    return conditions._asdict() | {"throttled": None if conditions.throttled is None else list(conditions.throttled)}


def measurement_json(measurement: Measurement) -> dict[str, Any]:
    """All of a measurement; every figure of joules and watts under a name for measured and one for modelled ones."""
    modelled = measurement.source is not None and measurement.source.modelled
    watts = None
    if measurement.joules is not None and measurement.seconds > 0:
        watts = measurement.joules / measurement.seconds
    figures = {
        "joules": measurement.joules,
        "net_joules": measurement.net_joules,
        "watts": watts,
        "idle_watts": measurement.idle_watts,
    }
    result: dict[str, Any] = {name: None if modelled else value for name, value in figures.items()}
    result["joules_half_width"] = None if modelled else measurement.half_width_joules
    result |= {modelled_name(name): value if modelled else None for name, value in figures.items()}
    result |= {"rails_joules": {} if modelled else measurement.rails, "seconds": measurement.seconds}
    result |= {"samples": measurement.samples, "longest_gap_s": measurement.longest_gap_s}
    result |= {"valid": measurement.valid, "problems": list(measurement.problems)}
    return result


def modelled_name(name: str) -> str:
    """``net_joules`` becomes ``net_modelled_joules``."""
    return name.replace("joules", "modelled_joules").replace("watts", "modelled_watts")


def amount(value: float) -> str:
    """Four digits, never with an exponent below a million."""
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"


def source_line(source: Source | None) -> str:
    """Which sensor, how wide and how good."""
    if source is None:
        return "no sensor: joules are unknown"
    if source.modelled:
        return f"{source.label}: NOT MEASURED; {source.covers}"
    return f"{source.sensor} ({source.scope}, {source.quality}): {source.covers}"


def conditions_line(conditions: Conditions | None) -> str:
    """Temperature, throttling, clocks and mode, as far as they are known."""
    if conditions is None:
        return ""
    parts = []
    if conditions.temperature_c is not None:
        parts.append(f"{conditions.temperature_c:.1f} °C")
    if conditions.throttled is not None:
        parts.append(f"throttled: {', '.join(conditions.throttled)}" if conditions.throttled else "not throttled")
    parts += [f"{name} {hertz / 1e6:.0f} MHz" for name, hertz in conditions.clocks_hz.items()]
    if conditions.power_mode is not None:
        parts.append(f"mode {conditions.power_mode}")
    return ", ".join(parts)
