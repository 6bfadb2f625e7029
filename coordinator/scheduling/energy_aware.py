"""The product's own selector: least energy to accuracy, with no battery emptied and nobody left out for long."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from coordinator.aggregation.options import take_options
from coordinator.scheduling import energy_queue, frugality
from coordinator.scheduling.base import Selection
from coordinator.scheduling.draws import Rows, chances, draw
from coordinator.scheduling.energy_score import even_weights, factors
from coordinator.scheduling.energy_work import Work, fit_work
from coordinator.scheduling.notes import Marks
from coordinator.scheduling.openings import late_due, note_opened, opens_round
from coordinator.scheduling.roles import as_anchor, draw_anchors
from coordinator.scheduling.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.events import HistoryRow
    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import Choice, Outcome, RoundRequest

_SUCCESS_AT_FIRST = 0.77  # as many as an over-commitment of 1.3 reckons with
_SUCCESS_RATE = 0.05  # of the moving average
_MOST_OVER_COMMIT = 1.5


class EnergyAware:
    """Gates and work by :mod:`energy_work`, then half of the places by score and half by even participation.

    The score (:mod:`energy_score`) is utility x speed x thrift x battery headroom x age, over ``(1 + n)^0.5``, the
    virtual energy queue (:mod:`energy_queue`) and failures; only devices whose loss is known have one. The other places
    are drawn from everybody left with weight ``thrift / (1 + n)``. Both are draws, so nobody is certain, and nobody is
    never chosen. Of what the plan's ``over_commit`` asks for, only as many are taken as recent failures call for, and
    of the plan's target only the share that the falling loss calls for (:mod:`frugality`).

    Options:
        exploit_share: of the places that go by score.
        energy_exponent, speed_exponent, speed_quantile: of the factors.
        headroom: share of the battery above the reserve from which on more of it is worth no more.
        reserve_percent: where a device's owner does not say.
        margin_percent: that must be left above the reserve: idling and heartbeats draw on it, too.
        least_availability: 0 to 1; who is below, and probably not there for as long as its job takes, is let in with
            the chance ``availability / least_availability``.
        least_temperature_margin_c, least_free_memory_mb: for the gates.
        mains_weight: 1: joules from mains count as those of batteries, 0: they are free.
        queue_jobs: jobs beyond its share that halve a device's score.
        round_joules: of one device in a round that put nothing into its queue; 0: its share of what the round drew.
        upload_share: of the deadline that an update may take before it is made smaller; least_update_share: of the
            plan's bytes that it has at least. 1: no update is made smaller.
        anchors: 1: who cannot do the least work may be an anchor.
        anchor_probability: as of ``random``.
        adaptive_target: 1: late updates on their way are asked for no second time; at least half the target is.
        first_share, share_step, stall_rounds, stall_gain: of the target, see :mod:`frugality`; ``first_share`` 1: all
            of it from the first round on.
    """

    name: ClassVar[str] = "energy_aware"
    defaults: ClassVar[Mapping[str, float]] = {
        "exploit_share": 0.5,
        "energy_exponent": 0.5,
        "speed_exponent": 2.0,
        "speed_quantile": 0.5,
        "headroom": 0.25,
        "reserve_percent": 20.0,
        "margin_percent": 5.0,
        "least_availability": 0.1,
        "least_temperature_margin_c": 2.0,
        "least_free_memory_mb": 64.0,
        "mains_weight": 1.0,
        "queue_jobs": 10.0,
        "round_joules": 0.0,
        "upload_share": 0.25,
        "least_update_share": 0.25,
        "anchors": 0.0,
        "anchor_probability": 0.0,
        "adaptive_target": 1.0,
        "first_share": 0.5,
        "share_step": 0.1,
        "stall_rounds": 10.0,
        "stall_gain": 0.02,
    }
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **dict.fromkeys(("exploit_share", "speed_quantile", "least_availability", "mains_weight"), (0.0, 1.0)),
        **dict.fromkeys(("anchors", "anchor_probability", "adaptive_target"), (0.0, 1.0)),
        **dict.fromkeys(("energy_exponent", "speed_exponent"), (0.0, 8.0)),
        **dict.fromkeys(("reserve_percent", "margin_percent"), (0.0, 100.0)),
        **dict.fromkeys(("headroom", "upload_share", "least_update_share", "first_share"), (0.01, 1.0)),
        **dict.fromkeys(("share_step", "stall_gain"), (0.0, 1.0)),
        "stall_rounds": (1.0, 1e6),
        "least_temperature_margin_c": (0.0, 100.0),
        "least_free_memory_mb": (0.0, 1e6),
        "queue_jobs": (1e-3, 1e9),
        "round_joules": (0.0, 1e12),
    }

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        self.options = take_options(options, self.defaults, self.ranges)

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> EnergyAware:
        return cls(options)

    @property
    def least_update_share(self) -> float:
        """Of the plan's bytes for an update, that every device is given at least."""
        return self.options["least_update_share"]

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        table, marks = Table(fleet, request, now), Marks(request.candidates)
        work = fit_work(table, self.options, marks)
        places, wanted = self.places(now, request)
        rows = self._draw(table, work, places, marks)
        choices = [_choice(request, table, work, row) for row in rows.tolist()]
        if self.options["anchor_probability"]:
            probability = self.options["anchor_probability"]
            choices = draw_anchors(request.random, choices, table.has("anchor"), rows, probability)
        if choices:
            note_opened(now, request)
        goal = None if wanted is None else max(1, min(wanted, len(choices)))
        return Selection(choices=choices, notes=marks.table(), wanted=goal)

    def places(self, now: float, request: RoundRequest) -> tuple[int, int | None]:
        """How many to choose, and where a round opens: how many updates are to close it.

        The latter is the share of the target, less the late updates that are due (at least half of it stays); as many
        more are chosen as failures call for, and the plan's over-commitment allows.
        """
        if not opens_round(request):
            return max(0, request.count), None
        rules = request.plan.participation
        called_for = max(1.0 / max(request.memory.get("success", _SUCCESS_AT_FIRST), 1e-9), 1.0)
        over_commit = min(called_for, rules.over_commit, _MOST_OVER_COMMIT)
        whole = rules.target * frugality.share_now(request.memory, self.options)
        wanted = math.ceil(whole - 1e-9)
        if self.options["adaptive_target"]:
            wanted = max(math.ceil(whole / 2), wanted - late_due(now, request))
        return max(0, min(math.ceil(min(whole, wanted) * over_commit - 1e-9), request.count)), wanted

    def _draw(self, table: Table, work: Work, places: int, marks: Marks) -> Rows:
        """The chosen rows: by score, then evenly."""
        random = table.request.random
        ready = np.flatnonzero(work.ready)
        marks.figure("seconds", work.seconds)
        marks.figure("joules", work.joules)
        marks.figure("charge_after", table.charge_after(work.joules))
        marks.figure("steps", work.steps)
        known = ready[~np.isnan(table.loss_rms[ready])]
        by_score = min(int(places * self.options["exploit_share"] + random.random()), len(known), places)
        parts = factors(table, work, known, self.options)
        for name, values in parts.items():
            marks.figure(name, values, known)
        first = draw(random, known, parts["score"], by_score)
        free = work.ready.copy()
        free[first] = False
        rest = np.flatnonzero(free)
        weights = even_weights(table, work, rest, self.options)
        second = draw(random, rest, weights, places - len(first))
        marks.figure("chance", chances(parts["score"], by_score), known)
        marks.figure("chance", chances(weights, places - len(first)), rest)
        marks.mark(rest, "lost the draw (p={chance:.2g})")
        marks.mark(second, "drawn evenly (p={chance:.2g})")
        marks.mark(first, "drawn by score {score:.3g} (p={chance:.2g})")
        return np.concatenate([first, second])

    def observe(self, device: str, outcome: Outcome, memory: dict[str, float]) -> None:
        """Follows the share of jobs that end in time, and notes what failed ones cost.

        A declined one cost nothing and says nothing.
        """
        if not outcome.declined:
            energy_queue.note_ended(device, outcome, memory)
            success = memory.get("success", _SUCCESS_AT_FIRST)
            in_time = float(outcome.meta is not None and outcome.staleness == 0)
            memory["success"] = success + _SUCCESS_RATE * (in_time - success)

    def round_closed(
        self,
        round_: int,  # noqa: ARG002
        outcomes: Sequence[Outcome],
        histories: Mapping[str, HistoryRow],
        memory: dict[str, float],
    ) -> list[str]:
        """Moves the energy queues, and the share of the target."""
        frugality.note_round(outcomes, memory, self.options)
        return energy_queue.close_round(outcomes, histories, memory, self.options["round_joules"])


def _choice(request: RoundRequest, table: Table, work: Work, row: int) -> Choice:
    choice = request.choice(request.candidates[row])
    if work.anchor[row]:
        choice = as_anchor(choice)
    elif work.steps[row] < table.steps[row]:
        choice = msgspec.structs.replace(choice, epochs=None, steps=int(work.steps[row]))
    if work.up_bytes[row] < request.up_bytes:
        choice = msgspec.structs.replace(choice, byte_budget=int(work.up_bytes[row]))
    return choice
