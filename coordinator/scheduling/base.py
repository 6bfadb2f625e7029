"""The selector seam: who is asked, for how much work, in which role, until when, and why.

A selector is pure: no clock, no I/O, no randomness but ``request.random``, and nothing kept in the object. What a run
knows of a device is its :class:`~coordinator.events.HistoryRow`, which the round machine writes; what else a selector
must remember goes into ``request.memory``. Both are stored with the run, so a restarted coordinator chooses alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

from coordinator.events import AssignmentRow
from edge_runtime.messages import Role, UpdateMeta

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from coordinator.events import HistoryRow
    from coordinator.fleet import FleetView
    from coordinator.plan import Plan


class RoundRequest:
    """What is wanted, and what is known.

    Attributes:
        run, round, attempt: of the selection.
        count: so many devices are wanted; fewer may be chosen.
        candidates: sorted names; eligible, idle, not yet asked, and not kept waiting (``not_before_unix_s``).
        plan: of the run.
        random: seeded for this selection.
        history: by device; a device that was never asked has none.
        memory: the selector's own numbers, kept with the run; may be changed.
        bundle: first 4 bytes of its SHA-256, as heartbeats name it.
        up_bytes: about the bytes of one update.
        down_bytes: about the bytes that bring a device to the newest model.
        expected_late: of every job of an earlier version that is still open, how many seconds ago it was given, and how
            many its device takes from job to update (moving average; None: it never sent one).
    """

    __slots__ = (
        "attempt",
        "bundle",
        "candidates",
        "count",
        "down_bytes",
        "expected_late",
        "history",
        "memory",
        "plan",
        "random",
        "round",
        "run",
        "up_bytes",
    )

    def __init__(
        self,
        *,
        run: str,
        round_: int,
        attempt: int,
        count: int,
        candidates: Sequence[str],
        plan: Plan,
        random: Random,
        history: Mapping[str, HistoryRow] | None = None,
        memory: dict[str, float] | None = None,
        bundle: bytes = b"",
        up_bytes: int = 0,
        down_bytes: int = 0,
        expected_late: Sequence[tuple[float, float | None]] = (),
    ) -> None:
        self.run = run
        self.round = round_
        self.attempt = attempt
        self.count = count
        self.candidates = candidates
        self.plan = plan
        self.random = random
        self.history = {} if history is None else history
        self.memory = {} if memory is None else memory
        self.bundle = bundle
        self.up_bytes = up_bytes
        self.down_bytes = down_bytes
        self.expected_late = expected_late

    def choice(self, device: str) -> Choice:
        """The plan's own work for a device; selectors that tailor work replace fields of it."""
        training = self.plan.training
        return Choice(
            device=device,
            epochs=training.epochs,
            steps=training.steps,
            variant=self.plan.variant,
            codec=self.plan.uplink.codec,
            deadline_s=self.plan.participation.deadline_s,
        )


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One device and its work. ``deadline_s`` counts from now.

    ``byte_budget`` is for the encoded update; None: what the plan says, if ``codec`` is the plan's.
    """

    device: str
    epochs: int | None = None
    steps: int | None = None
    role: Role = "trainer"
    variant: str | None = None
    cut: str | None = None
    codec: str = "raw"
    byte_budget: int | None = None
    deadline_s: float


class Note(msgspec.Struct, frozen=True, array_like=True):
    """Why a candidate was chosen or not, in a few words, and what the selector computed of it, by name."""

    reason: str
    figures: dict[str, float] = {}


class Selection(msgspec.Struct, kw_only=True):
    """Who was chosen, and a note for every candidate about which there is something to say.

    Notes are a plain dictionary, or the columns of a :class:`~coordinator.scheduling.notes.NoteTable`.
    ``wanted``: so many updates of those chosen are to close the round, where that is not the plan's target; at least 1.
    """

    choices: list[Choice]
    notes: Mapping[str, Note] = {}
    wanted: int | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an assignment ended: ``meta`` of the update taken in, or None and the reason of the failure.

    ``declined``: the device did not begin because of its owner's limits.
    """

    assignment: AssignmentRow
    meta: UpdateMeta | None = None
    elapsed_s: float = 0.0
    staleness: int = 0
    reason: str = ""
    declined: bool = False


class Selector(Protocol):
    """Chooses devices and their work; one instance serves one run."""

    name: ClassVar[str]

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        """At most ``request.count`` choices among ``request.candidates``, no device twice; fewer is allowed."""
        ...

    def observe(self, device: str, outcome: Outcome, memory: dict[str, float]) -> None:
        """Learns how an assignment of ``device`` ended; may change ``memory``."""
        ...

    def round_closed(
        self,
        round_: int,
        outcomes: Sequence[Outcome],
        histories: Mapping[str, HistoryRow],
        memory: dict[str, float],
    ) -> list[str]:
        """Learns which updates a round took, in update id order; may change ``memory`` and ``queue_j`` of histories.

        Gives the devices whose history it changed.
        """
        ...


class Memoryless:
    """The part of a selector that learns nothing but what histories hold."""

    def observe(self, device: str, outcome: Outcome, memory: dict[str, float]) -> None:
        """Learns nothing."""

    def round_closed(
        self,
        round_: int,  # noqa: ARG002
        outcomes: Sequence[Outcome],  # noqa: ARG002
        histories: Mapping[str, HistoryRow],  # noqa: ARG002
        memory: dict[str, float],  # noqa: ARG002
    ) -> list[str]:
        """Learns nothing."""
        return []
