"""Anchors among those who were chosen: they make one pass at the model they got, instead of taking steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from random import Random

    from coordinator.scheduling.base import Choice
    from coordinator.scheduling.draws import Mask, Rows


def as_anchor(choice: Choice) -> Choice:
    """The same device with one pass instead of steps."""
    return msgspec.structs.replace(choice, role="anchor")


def draw_anchors(random: Random, choices: list[Choice], able: Mask, rows: Rows, probability: float) -> list[Choice]:
    """Makes each chosen device that is able to (``able[row]``) an anchor with this probability.

    Wu et al., "Anchor sampling for federated learning with partial client participation", ICML 2023, algorithm 1.
    """
    if probability <= 0.0:
        return choices
    drawn = [random.random() < probability for _ in choices]
    return [
        as_anchor(choice) if hit and able[row] else choice
        for choice, hit, row in zip(choices, drawn, rows.tolist(), strict=True)
    ]
