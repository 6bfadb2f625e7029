"""FedAvg: the weighted mean of the client updates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from coordinator.aggregation.capping import most
from coordinator.aggregation.options import take_options

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.aggregation.base import Round, State, Sums, Vector
    from edge_runtime.messages import Role, UpdateMeta


class FedAvg:
    """McMahan et al. 2017, algorithm 1, with polynomial staleness weights (Xie et al. 2019, "poly", section 5).

    The change is ``sum(w_i * delta_i) / sum(w_i)`` with ``w_i = samples_i * (1 + staleness_i) ** -exponent``. Devices
    may claim any samples, so no ``w_i`` counts more than ``weight_cap`` (10; 0: any) times the median of the round's.

    Also the base of other methods, which override what differs. ``defaults`` are a method's own options and ``ranges``
    what they may be; ``staleness_exponent`` is handed over from the plan. ``capped`` says whether there is a
    ``weight_cap``: not where claims buy nothing.
    """

    name: ClassVar[str] = "fedavg"
    channels: ClassVar[tuple[str, ...]] = ("delta",)
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {}
    down_channels: ClassVar[tuple[str, ...]] = ("model",)
    table: ClassVar[bool] = False
    capped: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, float]] = {}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        """Takes the plan's options; raises ValueError for one that is unknown or out of range."""
        defaults = {"staleness_exponent": 0.5, **({"weight_cap": 10.0} if self.capped else {}), **self.defaults}
        common = ("staleness_exponent", "weight_cap")
        ranges = {**dict.fromkeys(common, (0, math.inf)), **self.ranges}
        self.options = take_options(options, defaults, ranges, handed=("staleness_exponent",))
        self.least = 1

    def init(self, size: int) -> State:  # noqa: ARG002
        """No state."""
        return {}

    def down(self, model: Vector, state: State) -> dict[str, Vector]:  # noqa: ARG002
        """The model alone."""
        return {"model": model}

    def accept(self, meta: UpdateMeta, staleness: int) -> str:  # noqa: ARG002
        """Every update may count."""
        return ""

    def weight(self, meta: UpdateMeta, staleness: int) -> float:
        """Samples, less for late updates."""
        return meta.samples * self.damping(staleness)

    def damping(self, staleness: int) -> float:
        """``(1 + staleness) ** -exponent``."""
        return float((1.0 + staleness) ** -self.options["staleness_exponent"])

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The weighted mean."""
        heaviest = self.most(update.weight for update in round_.contributions)
        change = round_.total("delta", lambda update: min(update.weight, heaviest))
        change /= sum(min(update.weight, heaviest) for update in round_.contributions)
        return change, state

    def most(self, claims: Iterable[float]) -> float:
        """What of a round's claims (weights, steps) counts at most; see :mod:`coordinator.aggregation.capping`."""
        return most(claims, self.options["weight_cap"])
