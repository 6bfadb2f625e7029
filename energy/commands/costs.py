"""Costs of training steps as text: names of quantities, and figures in units that people read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.report.units import QUANTITY_UNIT
from energy.report.units import amount as _amount

if TYPE_CHECKING:
    from energy.thor.profile import Profile

QUANTITY_NAMES = {
    "joules": "joules",
    "modelled_joules": "modelled joules",
    "cpu_seconds": "CPU seconds",
    "seconds": "seconds",
}


def amount(value: float, quantity: str) -> str:
    """Three digits with a unit, such as ``1.23 mJ``; the name of the quantity has to stand beside it."""
    return _amount(value, QUANTITY_UNIT[quantity]).replace("\u00a0", " ")


def factor_line(profile: Profile, quantities: list[str]) -> str:
    """What whole models were corrected by: ``factor 1.04 by 2 anchors``."""
    known = [quantity for quantity in quantities if quantity in profile.factor]
    if not known:
        return "no factor (no anchor)"
    anchors = max(anchor_count(profile, quantity) for quantity in known)
    factors = {f"{profile.factor[quantity]:.2f}" for quantity in known}
    if len(factors) == 1 and len(known) == len(quantities):
        words = factors.pop()
    else:
        words = ", ".join(f"{profile.factor[quantity]:.2f} ({QUANTITY_NAMES[quantity]})" for quantity in known)
    return f"factor {words} by {anchors} anchor{'' if anchors == 1 else 's'}"


def anchor_count(profile: Profile, quantity: str) -> int:
    """How many whole models set the factor of this quantity."""
    return sum(whole.anchor and whole.quantity == quantity for whole in profile.wholes)
