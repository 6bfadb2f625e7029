"""Plain steps on the server: ``new = base + lr * change``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.options import take_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.aggregation.base import State, Sums, Vector

SMALLEST = 1e-12  # of options that must be above 0


class Sgd:
    """In float64, rounded to float32 once. Option ``lr``: the server learning rate (1.0).

    Also the base of other optimisers; ``defaults`` are an optimiser's own options and ``ranges`` what they may be.
    """

    name: ClassVar[str] = "sgd"
    defaults: ClassVar[Mapping[str, float]] = {"lr": 1.0}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"lr": (SMALLEST, math.inf)}

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        """Takes the plan's options; raises ValueError for one that is unknown or out of range."""
        self.options = take_options(options, self.defaults, self.ranges)

    def init(self, size: int) -> State:  # noqa: ARG002
        """No state."""
        return {}

    def apply(self, base: Vector, change: Sums, state: State) -> tuple[Vector, State, dict[str, float]]:
        """One step; sets nothing for the devices."""
        return step(base, change, self.options["lr"]), state, {}


def step(base: Vector, change: Sums, lr: float) -> Vector:
    """``base + lr * change`` in float64, as float32 ``[size]``."""
    import numpy as np

    with np.errstate(over="ignore"):  # what leaves the range of float32 is refused with the model
        return (base + lr * change).astype(np.float32)
