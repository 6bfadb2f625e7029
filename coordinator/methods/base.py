"""The server method seam: what is sent down, which updates count for how much, and how they make the next model.

Methods are pure and keep nothing between calls: state that must survive from round to round goes in and out of
``apply`` as named arrays and is stored beside the model. numpy is imported where it is used: the round machine asks
``accept`` and ``weight`` in processes that never aggregate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_runtime.messages import UpdateMeta

Vector: TypeAlias = "npt.NDArray[np.float32]"
Accumulator: TypeAlias = "npt.NDArray[np.float64]"
State: TypeAlias = "dict[str, npt.NDArray[Any]]"


class ServerMethod(Protocol):
    """One method; one instance serves one run."""

    name: ClassVar[str]

    def init(self, size: int) -> State:
        """State before round 0 for a model of ``size`` elements; empty for stateless methods."""
        ...

    def down(self, model: Vector, state: State) -> Vector:
        """What devices receive, float32 ``[size]``; the model itself for most methods."""
        ...

    def accept(self, meta: UpdateMeta, staleness: int) -> str:
        """Empty if the update may count, else the reason why not. Must not depend on other updates."""
        ...

    def weight(self, meta: UpdateMeta, staleness: int) -> float:
        """Weight > 0 of an update that is ``staleness`` versions old."""
        ...

    def aggregate(self, total: Accumulator, update: Vector, weight: float) -> None:
        """Adds one update to ``total`` (float64 ``[size]``, zeros at the start); called in update id order."""
        ...

    def apply(self, base: Vector, total: Accumulator, weight_sum: float, state: State) -> tuple[Vector, State]:
        """The next model and the state for the next round."""
        ...
