"""Words and numbers for people."""

from __future__ import annotations

NO_SERVER = "no server is running on this state folder"


def counted(count: int, noun: str) -> str:
    """A number and what it counts: "1 device", "2 devices"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def percent(value: float | None) -> str:
    """A share; "-" if it was not measured."""
    return "-" if value is None else f"{100 * value:.2f} %"


def size(count: int) -> str:
    """A number of bytes."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def saving(ratio: float | None) -> str:
    """How many times fewer bytes than float32; empty if it was not measured."""
    return "" if ratio is None else f" ({ratio:.1f}x fewer)" if ratio >= 1 else f" ({1 / ratio:.1f}x more)"
