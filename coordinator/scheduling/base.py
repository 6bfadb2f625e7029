"""The selector seam: who is asked, for how much work, until when.

A selector is pure: no clock, no I/O, no randomness but ``request.random``. What it learns comes through ``observe``;
after a restart the outcomes still stored (those of the last ``max_staleness`` versions) are observed again in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

from coordinator.events import AssignmentRow
from edge_runtime.messages import UpdateMeta

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from coordinator.fleet import FleetView
    from coordinator.plan import Plan


class RoundRequest:
    """What is wanted: up to ``count`` of ``candidates`` (sorted names; eligible, idle, not yet asked)."""

    __slots__ = ("attempt", "candidates", "count", "plan", "random", "round", "run")

    def __init__(
        self, *, run: str, round_: int, attempt: int, count: int, candidates: Sequence[str], plan: Plan, random: Random
    ) -> None:
        self.run = run
        self.round = round_
        self.attempt = attempt
        self.count = count
        self.candidates = candidates
        self.plan = plan
        self.random = random

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
    variant: str | None = None
    cut: str | None = None
    codec: str = "raw"
    byte_budget: int | None = None
    deadline_s: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an assignment ended: ``meta`` of the update taken in, or None and the reason of the failure."""

    assignment: AssignmentRow
    meta: UpdateMeta | None = None
    elapsed_s: float = 0.0
    staleness: int = 0
    reason: str = ""


class Selector(Protocol):
    """Chooses devices and their work; one instance serves one run."""

    name: ClassVar[str]

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> list[Choice]:
        """At most ``request.count`` choices among ``request.candidates``, no device twice; fewer is allowed."""
        ...

    def observe(self, device: str, outcome: Outcome) -> None:
        """Learns how an assignment of ``device`` ended."""
        ...
