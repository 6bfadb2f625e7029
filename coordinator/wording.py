"""Words and numbers for people."""

from __future__ import annotations

from typing import Any

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


def duration(seconds: float) -> str:
    """A time that is to pass, in the unit that people would choose: "58 s", "15 min", "6 h"."""
    value = max(0.0, seconds)
    for unit, most, next_ in (("s", 120, 60), ("min", 120, 60), ("h", 48, 24)):
        if round(value) < most:
            return f"{value:.0f} {unit}"
        value /= next_
    return f"{value:.0f} days"


def joules(value: float) -> str:
    """An energy, to three digits."""
    for unit in ("J", "kJ", "MJ"):
        if abs(value) < 999.5 or unit == "MJ":
            break
        value /= 1000
    text = f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return f"{text} {unit}"


def energy_words(energy: dict[str, Any]) -> str:
    """Joules of jobs with the word measured or modelled beside each; "-" if nothing is known.

    A question mark at the end: some of them are of jobs whose figures are doubtful.
    """
    parts = (("joules", "measured"), ("modelled_joules", "modelled"))
    known = ", ".join(f"{joules(energy[key])} {word}" for key, word in parts if energy[key] is not None)
    return f"{known}{' ?' if energy['doubtful_jobs'] else ''}" if known else "-"


def source_words(source: dict[str, Any] | None) -> str:
    """Where a device has its joules from."""
    if source is None:
        return "-"
    if "modelled" not in (source["quality"], source["scope"]):
        return f"{source['sensor']}, {source['scope']}, measured"
    return "modelled" if source["sensor"] == "modelled" else f"{source['sensor']}, modelled"


def number(value: float | None) -> str:
    """A number; "-" if it was not measured."""
    return "-" if value is None else f"{value:.4f}"


def saving(ratio: float | None) -> str:
    """How many times fewer bytes than float32; empty if it was not measured."""
    if ratio is None:
        return ""
    if f"{max(ratio, 1 / ratio):.1f}" == "1.0":
        return " (as many as float32)"
    return f" ({ratio:.1f}x fewer)" if ratio >= 1 else f" ({1 / ratio:.1f}x more)"
