"""What a device knows about itself: CPU, memory, temperature, battery, link bytes, clock.

A value that cannot be measured is None, never a silent zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from pathlib import Path
from typing import Any

import psutil

from edge_runtime.messages import Telemetry
from energy.temperature import hottest_c

_TIMEX_BYTES = 208  # struct timex on 64-bit Linux
_STA_UNSYNC = 0x0040
_TIME_ERROR = 5


def measure(started_monotonic_s: float, sent_bytes: int, received_bytes: int) -> Telemetry:
    """Reads all sensors once; takes about a millisecond and does not block."""
    battery = _battery()
    return Telemetry(
        uptime_s=round(time.monotonic() - started_monotonic_s, 3),
        clock_unix_s=time.time(),
        clock_synchronised=clock_synchronised(),
        cpu_percent=psutil.cpu_percent(interval=None),
        free_memory_bytes=psutil.virtual_memory().available,
        temperature_c=temperature_c(),
        battery_percent=None if battery is None else float(battery.percent),
        on_external_power=None if battery is None else battery.power_plugged,
        link_sent_bytes=sent_bytes,
        link_received_bytes=received_bytes,
    )


def _battery() -> Any:
    try:
        return psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except (OSError, ValueError):  # some drivers list a battery whose files refuse to be read
        return None


def temperature_c(root: Path = Path("/")) -> float | None:
    """The hottest zone in degrees Celsius that can be believed; None where none can be read."""
    return hottest_c(root)


def clock_synchronised() -> bool | None:
    """Whether the kernel says the clock is disciplined by a time source; None where it cannot be asked."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = (ctypes.c_ubyte * _TIMEX_BYTES)()  # modes = 0: read only
        state = libc.adjtimex(ctypes.byref(buffer))
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    status = int.from_bytes(bytes(buffer[40:44]), "little")  # timex.status follows modes, offset, freq, two errors
    return state != _TIME_ERROR and not status & _STA_UNSYNC


def release_memory() -> None:
    """Gives memory that was freed back to the system; glibc keeps it otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> str:
    """Short description of the machine, e.g. ``Linux aarch64``."""
    name = os.uname()
    return f"{name.sysname} {name.machine}"
