"""A heartbeat's numbers as bytes, made once when it arrives: selections read those of thousands of devices at once."""

from __future__ import annotations

from operator import attrgetter
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.messages import Heartbeat

FIELDS = (
    "on_external_power",
    "link_metered",
    "declines",
    "free_memory_mb",
    "temperature_margin_c",
    "battery_percent",
    "reserve_percent",
    "up_kbit_s",
    "down_kbit_s",
    "step_us",
    "step_uj",
    "availability_percent",
    "data_left_mb",
    "joules_left",
)
COLUMNS = (*FIELDS, "bundle")  # little-endian float64 each; NaN: unknown

_NAN = float("nan")
_values = attrgetter(*FIELDS)
_pack = Struct(f"<{len(COLUMNS)}d").pack
NOTHING = _pack(*[0.0 if name == "declines" else _NAN for name in COLUMNS])  # of a device that was not heard yet


def bundle_number(tag: bytes) -> float:
    """The first bytes of a bundle's hash as a number; NaN, which equals nothing, for none."""
    return float(int.from_bytes(tag, "big")) if tag else _NAN


def numbers(heartbeat: Heartbeat) -> bytes:
    """The row of ``COLUMNS``."""
    values = [_NAN if value is None else value for value in _values(heartbeat)]
    return _pack(*values, bundle_number(heartbeat.bundle))
