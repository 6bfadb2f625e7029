"""Places that are filled by score, by chance among the best: Oort's cut-off, with the reasons noted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coordinator.scheduling.draws import Column, Rows, chances, draw, smallest

if TYPE_CHECKING:
    from random import Random

    from coordinator.scheduling.notes import Marks


class Places(NamedTuple):
    """``free`` places; drawn from those with at least ``cut_off`` times the score of rank ``window``."""

    why: str
    free: int
    window: int
    cut_off: float = 1.0


def draw_above(random: Random, rows: Rows, scores: Column, places: Places, marks: Marks) -> list[int]:
    """The drawn ones of ``rows``, in proportion to ``scores`` (one per row, not negative).

    Equal scores are all in or all out, so that the order of names decides nothing.
    """
    marks.figure("score", scores, rows)
    if not len(rows) or places.free <= 0:
        marks.mark(rows, f"no place was left {places.why}")
        return []
    last = scores[smallest(-scores, max(places.window, places.free))[-1]]
    inside = scores >= last * places.cut_off
    marks.mark(rows, "its score of {score:.3g} is under the cut-off")
    pool, weights = rows[inside], scores[inside]
    marks.mark(pool, f"lost the draw {places.why} (p={{chance:.2g}})")
    marks.figure("chance", chances(weights, places.free), pool)
    drawn = draw(random, pool, weights, places.free)
    marks.mark(drawn, f"chosen {places.why} (score {{score:.3g}})")
    return [int(row) for row in drawn]
