"""Numbers with units for people: prefixes, digits, and words that say whether joules were measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SPACE = "\u00a0"  # between a number and its unit, so that no line breaks there
_PREFIXES = ((1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "\u00b5"), (1e-9, "n"))
# What a figure is, by its quantity: unit, and the words that stand beside it.
QUANTITY_UNIT = {"joules": "J", "modelled_joules": "J", "cpu_seconds": "s", "seconds": "s"}
QUANTITY_WORDS = {
    "joules": "measured energy",
    "modelled_joules": "modelled energy",
    "cpu_seconds": "CPU time",
    "seconds": "wall time",
}
PREDICTED_WORDS = {**QUANTITY_WORDS, "joules": "energy"}  # from what was measured


def quantity_words(quantity: str) -> str:
    """What a figure of this quantity is, in words."""
    return QUANTITY_WORDS.get(quantity, quantity)


def prefix_for(value: float, unit: str) -> tuple[float, str]:
    """The scale and the unit with prefix in which ``value`` has one to three digits before the point.

    Seconds keep s for large values.
    """
    for scale, prefix in _PREFIXES:
        if unit == "s" and scale > 1:
            continue
        if abs(value) >= scale * 0.9995:
            return scale, prefix + unit
    return (1.0, unit) if value == 0 else (_PREFIXES[-1][0], _PREFIXES[-1][1] + unit)


def amount(value: float | None, unit: str = "J") -> str:
    """Three digits with a prefixed unit; a dash where it is unknown."""
    if value is None:
        return "\u2013"
    scale, name = prefix_for(value, unit)
    return f"{digits(value / scale)}{_SPACE}{name}"


def digits(value: float) -> str:
    """Three significant digits without an exponent, as far as that is readable."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 6 or magnitude < -6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - magnitude)}f}"


def percent(value: float | None, places: int = 1) -> str:
    """A share."""
    return "\u2013" if value is None else f"{100 * value:.{places}f}{_SPACE}%"


def duration(seconds: float | None) -> str:
    """A stretch of time."""
    if seconds is None:
        return "\u2013"
    if seconds < 120:
        return f"{seconds:.1f}{_SPACE}s"
    return f"{seconds / 60:.1f}{_SPACE}min" if seconds < 7200 else f"{seconds / 3600:.1f}{_SPACE}h"


def counted(count: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def total(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def both_words(measured: float | None, modelled: float | None) -> str:
    """Joules with the word beside each figure."""
    parts = ((measured, "measured"), (modelled, "modelled"))
    return ", ".join(f"{amount(value)}{_SPACE}{word}" for value, word in parts if value is not None) or "unknown"
