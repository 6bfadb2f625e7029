"""Options of server methods and optimisers: checked once, when the plug-in is made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coordinator.plugins import check_options

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def take_options(
    given: Mapping[str, float] | None,
    defaults: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    handed: Collection[str] = (),
) -> dict[str, float]:
    """The defaults with what was given put in, each within its range (both ends included).

    Those in ``handed`` come from elsewhere in the plan, so errors do not offer them.

    Raises:
        ValueError: an option nobody knows, or a value that is not finite or out of range.
    """
    options = check_options(given or {}, defaults, handed)
    for name, value in options.items():
        low, high = ranges.get(name, (-math.inf, math.inf))
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; give a finite number")
        if not low <= value <= high:
            reach = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{name} is {value:g}, it must be {reach}")
    return options


def whole(options: Mapping[str, float], name: str) -> int:
    """An option that counts.

    Raises:
        ValueError: it is not a whole number.
    """
    value = options[name]
    if value != int(value):
        raise ValueError(f"{name} is {value:g}; give a whole number")
    return int(value)
