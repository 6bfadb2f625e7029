"""What a run learns of a device from its jobs: how its history changes. Pure; the round machine saves the rows.

What devices say of themselves is bounded first (:mod:`coordinator.plausibility`), so that no lie reaches a selector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.plausibility import believed

if TYPE_CHECKING:
    from coordinator.events import AssignmentRow, HistoryRow
    from edge_runtime.messages import UpdateMeta

SMOOTHING = 0.5  # share of the newest value in a moving average
FIRST_FAILURE_PAUSE_S = 60.0  # doubled with every further failure in a row
LONGEST_FAILURE_PAUSE_S = 3600.0
SHORTEST_DECLINE_S = 1.0
LONGEST_DECLINE_S = 6 * 3600.0
CUT_OFF_LIMIT = 12  # where jobs that were cut off become failures
_SILENT, _ANSWERED = 4, 1  # what one adds to that
_MOST_DOUBLINGS = 16
_DEADLINES = 10  # a job that took longer than so many of them met a clock that was set


def note_asked(row: HistoryRow, round_: int) -> None:
    """The device was given a job in this round."""
    row.asked += 1
    row.last_round = round_


def note_taken(
    row: HistoryRow, assignment: AssignmentRow, meta: UpdateMeta, *, elapsed_s: float, deadline_s: float
) -> None:
    """An update of the device was taken in, ``elapsed_s`` after its job was given; the plan allows ``deadline_s``."""
    row.counted += 1
    row.failures = row.cut_off = 0
    row.not_before_unix_s, row.declined = 0.0, False
    elapsed_s = min(max(0.0, elapsed_s), _DEADLINES * deadline_s)
    facts = believed(meta, steps=assignment.steps, elapsed_s=max(elapsed_s, deadline_s))
    row.loss_rms, row.samples = facts.loss_rms, facts.samples
    row.elapsed_s = _averaged(row.elapsed_s, elapsed_s)
    row.step_s = _averaged(row.step_s, facts.step_s)
    row.step_j = _averaged(row.step_j, facts.step_j)


def note_failed(row: HistoryRow, now: float, patience_s: float) -> None:
    """A job of the device brought nothing that counts: it is asked less and less often, and never not at all.

    The pause doubles with every failure in a row, from ``FIRST_FAILURE_PAUSE_S`` (or ``patience_s``, where that is
    shorter: what a round waits for missing devices) to ``LONGEST_FAILURE_PAUSE_S``.
    """
    pause_s = min(FIRST_FAILURE_PAUSE_S, patience_s) * 2.0 ** min(row.failures, _MOST_DOUBLINGS)
    row.failures += 1
    row.not_before_unix_s, row.declined = now + min(pause_s, LONGEST_FAILURE_PAUSE_S), False


def note_cut_off(row: HistoryRow) -> bool:
    """A job was cancelled before its deadline, as its update could not count any more; True if that is a failure.

    Over-commitment cuts slow devices off, and that is no fault of theirs; but three in a row of which the device never
    said a word are, and a dozen are in any case.
    """
    row.cut_off += _SILENT
    return row.cut_off >= CUT_OFF_LIMIT


def note_answered(row: HistoryRow, elapsed_s: float | None = None) -> None:
    """The device said something about a job that was cut off; ``elapsed_s``: it sent the update, so long after it."""
    row.cut_off = max(0, row.cut_off - (_SILENT - _ANSWERED))
    row.elapsed_s = _averaged(row.elapsed_s, elapsed_s)


def note_declined(row: HistoryRow, now: float, declined_s: float) -> None:
    """The device declined a job for about ``declined_s``; that is no failure."""
    if not declined_s > SHORTEST_DECLINE_S:  # NaN, too
        declined_s = SHORTEST_DECLINE_S
    row.not_before_unix_s, row.declined = now + min(declined_s, LONGEST_DECLINE_S), True


def _averaged(before: float | None, value: float | None) -> float | None:
    if value is None or before is None:
        return before if value is None else value
    return (1 - SMOOTHING) * before + SMOOTHING * value
