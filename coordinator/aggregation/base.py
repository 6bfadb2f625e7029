"""The server method seam: what is sent down, which updates count for how much, and how they make the next model.

Methods are pure and keep nothing between calls: state that must survive from round to round goes in and out of
``apply`` as named arrays and is stored beside the model. numpy is imported where it is used: the round machine asks
``accept`` and ``weight`` in processes that never aggregate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from edge_runtime.compression import Update
    from edge_runtime.messages import UpdateMeta

Vector: TypeAlias = "npt.NDArray[np.float32]"
Totals: TypeAlias = "dict[str, npt.NDArray[np.float64]]"
State: TypeAlias = "dict[str, npt.NDArray[Any]]"


class ServerMethod(Protocol):
    """One method; one instance serves one run.

    Attributes:
        name: the name plans use.
        channels: the vectors of an update that this method wants; devices must send exactly these.
    """

    name: ClassVar[str]
    channels: ClassVar[tuple[str, ...]]

    def init(self, size: int) -> State:
        """State before round 0 for a model of ``size`` elements; empty for stateless methods."""
        ...

    def down(self, model: Vector, state: State) -> dict[str, Vector]:
        """What devices receive, float32 ``[size]`` by channel: ``{"model": model}``, the model itself.

        Devices take nothing else yet: a plan whose method sends more is refused.
        """
        ...

    def accept(self, meta: UpdateMeta, staleness: int) -> str:
        """Empty if the update may count, else the reason why not. Must not depend on other updates."""
        ...

    def weight(self, meta: UpdateMeta, staleness: int) -> float:
        """Weight > 0 of an update that is ``staleness`` versions old."""
        ...

    def aggregate(self, totals: Totals, update: Mapping[str, Update], weight: float) -> None:
        """Adds one update to ``totals`` (float64 ``[size]`` by channel, zeros at the start); in update id order.

        Updates may be sparse: :meth:`~edge_runtime.compression.Update.add_to` touches no more than they hold.
        """
        ...

    def apply(self, base: Vector, totals: Totals, weight_sum: float, state: State) -> tuple[Vector, State]:
        """The next model, float32 ``[size]``, and the state for the next round."""
        ...
