"""Oort: devices with a high loss on much data that are fast enough, and some that were never tried."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coordinator.aggregation.options import take_options
from coordinator.scheduling import pacer
from coordinator.scheduling.base import Selection
from coordinator.scheduling.draws import Column, Mask, Rows, clipped, filled, smallest, spread
from coordinator.scheduling.notes import Marks
from coordinator.scheduling.places import Places, draw_above
from coordinator.scheduling.table import Table, willing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.events import HistoryRow
    from coordinator.fleet import FleetView
    from coordinator.scheduling.base import Outcome, RoundRequest


class Oort:
    """Lai et al., "Oort: efficient federated learning via guided participant selection", OSDI 2021, algorithm 1.

    ``U = minmax(clip(|B| * rms loss)) + sqrt(0.1 ln R / L)``, times ``(T / t)^penalty`` where ``t > T``: ``R`` counts
    rounds, ``L`` is the last one the device was asked in, ``t`` its seconds from job to update, ``T`` the pacer's
    percentile of all ``t``. A share of the places goes to devices never tried, by samples and speed; the rest is drawn
    in proportion to ``U`` among those with at least ``cut_off`` of the ``U`` that would just be in.

    Other than the released code: the cut-off is the paper's 95 %, not 5 %; utilities come from all batches; failures
    lower the score for some rounds; the blacklist holds at most its share, and the rank that just is in always exists;
    exploration decays by rounds, not by calls, and its places are rounded at random, so single places explore, too.

    Options:
        exploration, exploration_decay, exploration_least: the share is ``max(least, exploration * decay^round)``.
        exploration_window: the untried are drawn from so many times the places, the best ones.
        penalty: exponent for those slower than ``T``; 0: none.
        clip: utilities are clipped to this quantile.
        cut_off: 0 to 1, see above.
        percentile, pacer_rounds, pacer_step: see :mod:`coordinator.scheduling.pacer`.
        blacklist_jobs: a device asked more often is left out; 0: nobody is.
        blacklist_share: at most this share of the candidates.
    """

    name: ClassVar[str] = "oort"
    defaults: ClassVar[Mapping[str, float]] = {
        "exploration": 0.9,
        "exploration_decay": 0.98,
        "exploration_least": 0.3,
        "exploration_window": 5.0,
        "penalty": 2.0,
        "clip": 0.95,
        "cut_off": 0.95,
        "percentile": 30.0,
        "pacer_rounds": 20.0,
        "pacer_step": 5.0,
        "blacklist_jobs": 0.0,
        "blacklist_share": 0.3,
    }
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **dict.fromkeys(("exploration", "exploration_decay", "exploration_least", "clip", "cut_off"), (0.0, 1.0)),
        "exploration_window": (1.0, 1e6),
        "penalty": (0.0, 10.0),
        "percentile": (1.0, 100.0),
        "pacer_rounds": (1.0, 1e6),
        "pacer_step": (0.0, 100.0),
        "blacklist_jobs": (0.0, 1e9),
        "blacklist_share": (0.0, 0.9),
    }

    def __init__(self, options: Mapping[str, float] | None = None) -> None:
        self.options = take_options(options, self.defaults, self.ranges)

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> Oort:
        return cls(options)

    def select(self, now: float, fleet: FleetView, request: RoundRequest) -> Selection:
        table, marks = Table(fleet, request, now), Marks(request.candidates)
        ready = self.ready(table, marks)
        self._blacklist(table, ready, marks)
        tried = np.flatnonzero(ready & (table.counted > 0))
        new = np.flatnonzero(ready & (table.counted <= 0))
        seconds = np.where(np.isnan(table.elapsed_s), table.seconds(table.steps), table.elapsed_s)
        fit_s = pacer.allowed_s(seconds, request.memory, self.options)
        speed = np.where(seconds > fit_s, (fit_s / seconds) ** self.options["penalty"], 1.0) * table.fade
        marks.figure("seconds", seconds)
        marks.figure("speed", speed)
        count = max(0, request.count)
        exploring = int(count * self._exploration(request.round) + request.random.random())
        first = min(max(count - min(exploring, count), count - len(new)), len(tried))
        exploit = Places("by utility", first, first, self.options["cut_off"])
        explore = Places("to try it", count - first, math.ceil((count - first) * self.options["exploration_window"]))
        rows = [
            *draw_above(request.random, tried, self.exploit(table, tried, speed, marks), exploit, marks),
            *draw_above(request.random, new, self.explore(table, new, speed), explore, marks),
        ]
        return Selection(choices=[request.choice(request.candidates[row]) for row in rows], notes=marks.table())

    def ready(self, table: Table, marks: Marks) -> Mask:
        """Who may be chosen at all."""
        return willing(table, marks)

    def exploit(self, table: Table, tried: Rows, speed: Column, marks: Marks) -> Column:
        """Scores of those that were tried."""
        bounded = clipped(filled((table.samples * table.loss_rms)[tried], 1.0), self.options["clip"])
        utility = spread(bounded)
        rounds = table.request.round + 1
        stale = np.sqrt(0.1 * math.log(rounds) / np.maximum(table.last_round[tried] + 1.0, 1.0))
        marks.figure("utility", utility, tried)
        marks.figure("staleness", stale, tried)
        return np.asarray((utility + stale) * speed[tried])

    def explore(self, table: Table, new: Rows, speed: Column) -> Column:
        """Weights of those never tried: what they could train in one job, and how fast."""
        one_job = table.steps * table.request.plan.training.batch_size
        return np.asarray((np.minimum(table.samples, one_job) * speed)[new])

    def _exploration(self, round_: int) -> float:
        decayed = self.options["exploration"] * self.options["exploration_decay"] ** round_
        return max(self.options["exploration_least"], decayed)

    def _blacklist(self, table: Table, ready: Mask, marks: Marks) -> None:
        most = self.options["blacklist_jobs"]
        if most <= 0:
            return
        tired = np.flatnonzero(ready & (table.asked > most))
        out = tired[smallest(-table.asked[tired], int(self.options["blacklist_share"] * np.count_nonzero(ready)))]
        ready[out] = False
        marks.mark(out, f"was asked more than {most:.0f} times")

    def observe(self, device: str, outcome: Outcome, memory: dict[str, float]) -> None:
        """Learns nothing: the history has it."""

    def round_closed(
        self,
        round_: int,  # noqa: ARG002
        outcomes: Sequence[Outcome],
        histories: Mapping[str, HistoryRow],  # noqa: ARG002
        memory: dict[str, float],
    ) -> list[str]:
        """Paces."""
        pacer.note_round(outcomes, memory, self.options)
        return []
