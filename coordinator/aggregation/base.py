"""The server's two seams: a method makes one change out of a round's updates, an optimiser applies it to the model.

Both are pure and keep nothing between calls: what must survive from round to round goes in and out as named arrays and
is stored beside the model; a vector per device goes into the method's table. numpy is imported where it is used: the
round machine asks ``accept`` and ``weight`` in processes that never aggregate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from edge_runtime.compression import Layout, Update
    from edge_runtime.messages import Role, UpdateId, UpdateMeta

Vector: TypeAlias = "npt.NDArray[np.float32]"
Sums: TypeAlias = "npt.NDArray[np.float64]"
State: TypeAlias = "dict[str, npt.NDArray[Any]]"
T = TypeVar("T")


class Contribution(Protocol):
    """One update that goes into the next model. ``weight`` is what the method's own ``weight`` said of it."""

    update: UpdateId
    meta: UpdateMeta
    weight: float
    staleness: int
    role: Role


class Table(Protocol):
    """One float32 vector ``[layout.size]`` per device, on disk and compressed; changes are kept with the new model."""

    def get(self, device: str) -> Vector | None:
        """The row of a device of this round, exactly as it was put; None: it has none (taken for zeros)."""
        ...

    def put(self, device: str, row: Vector) -> None:
        """Replaces the row of a device."""
        ...


class Round(Protocol):
    """What a method has to work with.

    Attributes:
        contributions: in update id order, at least one.
        layout: of every channel.
        base: the model that the next one is made from, float32 ``[layout.size]``.
        members: devices that have a row in the table or may get one.
        table: rows of the devices in ``contributions``; only for methods that have one.
        seed: of this round, for methods that draw.
    """

    contributions: Sequence[Contribution]
    layout: Layout
    base: Vector
    members: int
    seed: int

    @property
    def table(self) -> Table: ...

    def total(self, channel: str, weight: Callable[[Contribution], float]) -> Sums:
        """``sum(weight(c) * c[channel])`` in float64, of those with a weight other than 0 that hold the channel.

        Constant memory, and the same bits wherever it runs.
        """
        ...

    def each(self, channel: str, contributions: Sequence[Contribution], function: Callable[[Update], T]) -> Iterator[T]:
        """``function(c[channel])`` of these, in their order; decoded ahead in other processes where there are some.

        ``function`` is of a module (or a ``functools.partial`` of such a one), since it runs there; :func:`itself`
        brings the vectors here. Constant memory. What is asked again is decoded again.
        """
        ...

    def matrix(self, channel: str) -> npt.NDArray[np.float32]:
        """All contributions that hold the channel as rows, ``[n, layout.size]``, on disk if they are many."""
        ...

    def columns(self, width: int) -> Iterator[slice]:
        """Slices that cover the layout, for work on a matrix a part at a time."""
        ...


def itself(update: Update) -> Update:
    """For :meth:`Round.each`: the decoded vector as it is."""
    return update


class ServerMethod(Protocol):
    """Makes one change of the model out of the updates of a round; one instance serves one run.

    Attributes:
        name: the name plans use.
        channels: the vectors of a trainer's update; devices must send exactly these.
        roles: channels of the roles that it knows beside trainers.
        down_channels: names of what :meth:`down` gives; client methods declare the same.
        table: whether it keeps a vector per device.
        least: updates that a round must have for what the method promises; with fewer it does what it can.
    """

    name: ClassVar[str]
    channels: ClassVar[tuple[str, ...]]
    roles: ClassVar[Mapping[Role, tuple[str, ...]]]
    down_channels: ClassVar[tuple[str, ...]]
    table: ClassVar[bool]
    least: int

    def init(self, size: int) -> State:
        """State before round 0 for a model of ``size`` elements; empty for stateless methods."""
        ...

    def down(self, model: Vector, state: State) -> dict[str, Vector]:
        """What devices receive, float32 ``[size]`` by channel: ``{"model": model}``, the model itself, and more.

        Only a lossless downlink carries more than the model.
        """
        ...

    def accept(self, meta: UpdateMeta, staleness: int) -> str:
        """Empty if the update may count, else the reason why not. Must not depend on other updates."""
        ...

    def weight(self, meta: UpdateMeta, staleness: int) -> float:
        """Weight > 0 of an update that is ``staleness`` versions old."""
        ...

    def combine(self, round_: Round, state: State) -> tuple[Sums, State]:
        """The change of the model, float64 ``[size]``, and the state for the next round.

        What it says of buffers (running statistics) is added to the model as it is, past the optimiser.
        """
        ...


class ServerOptimizer(Protocol):
    """Applies changes to the model, as an optimiser applies (negative) gradients."""

    name: ClassVar[str]

    def init(self, size: int) -> State:
        """State before round 0."""
        ...

    def apply(self, base: Vector, change: Sums, state: State) -> tuple[Vector, State, dict[str, float]]:
        """The next model, float32 ``[size]``, the next state, and hyper-parameters for the devices' next jobs."""
        ...
