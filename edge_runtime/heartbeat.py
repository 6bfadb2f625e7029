"""What a device knows of itself, as the :class:`~edge_runtime.messages.Heartbeat` of at most 64 bytes that says it.

Pure: whatever comes in is rounded and clamped into range, so that nothing a sensor or a file says can make a heartbeat
too long, or stop one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edge_runtime.messages import DECLINES, Heartbeat

if TYPE_CHECKING:
    from edge_runtime.messages import Declines, Telemetry

BUNDLE_BYTES = 4  # of a bundle's SHA-256: enough to tell the few bundles of a fleet apart
_BYTE, _SHORT, _LONG = 0xFF, 0xFFFF, 0xFFFFFFFF
_PERCENT = 100
_CELSIUS = (-128, 255)
_MB = 1e6
_MICRO = 1e6


def heartbeat_of(
    telemetry: Telemetry,
    *,
    declines: Declines = "",
    max_temperature_c: float | None = None,
    reserve_percent: float | None = None,
    link_metered: bool | None = None,
    up_kbit_s: float | None = None,
    down_kbit_s: float | None = None,
    bundle_sha256: str = "",
    step_s: float | None = None,
    step_joules: float | None = None,
    availability: float | None = None,
    data_left_bytes: float | None = None,
    joules_left: float | None = None,
) -> Heartbeat:
    """The heartbeat that says all this; never raises. None stays None: it cannot be known.

    Args:
        telemetry: what was measured just now.
        declines: the owner's limit for which any job would be declined now; empty: none.
        max_temperature_c: the owner's thermal cap, in degrees Celsius.
        reserve_percent: what the owner wants left in the battery.
        link_metered: whether the owner pays for every byte.
        up_kbit_s: measured of the device's own transfers, in 1000 bits a second.
        down_kbit_s: likewise.
        bundle_sha256: that the step's figures are of; empty: of whatever is trained.
        step_s: seconds of one training step.
        step_joules: of one training step.
        availability: how likely the device can take part during the next hour, 0 to 1.
        data_left_bytes: of the owner's cap for this month.
        joules_left: of the owner's limit for this day.
    """
    heat = telemetry.temperature_c
    margin = None if heat is None or max_temperature_c is None else max_temperature_c - heat
    return Heartbeat(
        uptime_s=_within(telemetry.uptime_s, _LONG) or 0,
        clock_unix_s=_within(telemetry.clock_unix_s, _LONG) or 0,
        clock_synchronised=telemetry.clock_synchronised,
        on_external_power=telemetry.on_external_power,
        link_metered=link_metered,
        declines=DECLINES.index(declines),
        cpu_percent=_within(telemetry.cpu_percent, _PERCENT),
        free_memory_mb=_scaled(telemetry.free_memory_bytes, 1 / _MB, _SHORT),
        temperature_c=_within(heat, _CELSIUS[1], _CELSIUS[0]),
        temperature_margin_c=_below(margin, _CELSIUS[1], _CELSIUS[0]),
        battery_percent=_below(telemetry.battery_percent, _PERCENT),
        reserve_percent=_within(reserve_percent, _PERCENT),
        up_kbit_s=_within(up_kbit_s, _LONG),
        down_kbit_s=_within(down_kbit_s, _LONG),
        bundle=_prefix(bundle_sha256),
        step_us=_scaled(step_s, _MICRO, _LONG),
        step_uj=_scaled(step_joules, _MICRO, _LONG),
        availability_percent=_scaled(availability, _PERCENT, _PERCENT),
        data_left_mb=_above(None if data_left_bytes is None else data_left_bytes / _MB, _SHORT),
        joules_left=_above(joules_left, _LONG),
    )


def from_telemetry(telemetry: Telemetry) -> Heartbeat:
    """The heartbeat of an agent that sends the older :class:`~edge_runtime.messages.Telemetry`; never raises."""
    return heartbeat_of(telemetry)


def _within(value: float | None, highest: int, lowest: int = 0) -> int | None:
    """The nearest whole number in the range; None of what is no number."""
    if value is None or math.isnan(value):
        return None
    return lowest if value <= lowest else highest if value >= highest else round(value)


def _below(value: float | None, highest: int, lowest: int = 0) -> int | None:
    """Rounded down: of a reserve that must not be touched, not more than there is."""
    if value is None or math.isnan(value):
        return None
    return lowest if value <= lowest else highest if value >= highest else math.floor(value)


def _above(value: float | None, highest: int) -> int | None:
    """Rounded up: of a budget, so that a small one does not read as used up; the device knows it exactly."""
    if value is None or math.isnan(value):
        return None
    return 0 if value <= 0 else highest if value >= highest else math.ceil(value)


def _scaled(value: float | None, factor: float, highest: int) -> int | None:
    """At least 1 of anything above 0, so that what is small does not read as nothing."""
    found = None if value is None else _within(value * factor, highest)
    return 1 if found == 0 and value is not None and value > 0 else found


def _prefix(sha256: str) -> bytes:
    try:
        return bytes.fromhex(sha256)[:BUNDLE_BYTES]
    except ValueError:
        return b""
