"""Why each device was chosen for a round or not, and what became of it: from the stored reports of its selections."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from coordinator.scheduling.explaining import unpack
from coordinator.status_page import table
from coordinator.store.store import SELECTION_ROUNDS_KEPT
from coordinator.wording import counted
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.events import AssignmentRow, SelectionRow, UpdateRow
    from coordinator.scheduling import Choice
    from coordinator.scheduling.explaining import Report
    from coordinator.store import Store, StoredRun

_COLUMNS = ("device", "chosen", "why", "role", "steps", "deadline", "became")
_ESTIMATES = "~ what the selector estimated before the job, none of it measured; - it knew nothing"
_OF_CHOSEN = ("role", "steps", "epochs", "deadline_s", "byte_budget", "assignment", "became")


def explanation(store: Store, run: str, round_: int, device: str | None = None) -> list[dict[str, Any]]:
    """The selections of a round, oldest first, each with an entry per device that the server knew then.

    Args:
        store: of the coordinator.
        run: its name.
        round_: from 0.
        device: only this one.

    Returns:
        Per selection ``selection`` (a number that counts those of the run), ``round``, ``attempt``, ``at_unix_s`` and
        ``devices``: ``device``, ``chosen``, ``why``, ``figures`` (what the selector computed, by name); of the chosen
        ones ``role``, ``steps`` or ``epochs``, ``deadline_s``, ``byte_budget``, ``assignment`` and ``became`` (what
        became of it), which are None for the others.

    Raises:
        UnknownRunError: no such run.
        ConfigError: the run has no such round, nobody was asked in it yet, or its reports are no longer kept; or no
            selection knew the device.
        StoreError: a report cannot be read.
    """
    stored = store.run(run)
    rows = store.selections(run, round_)
    if not rows:
        raise ConfigError(_none_chosen(store, stored, round_) or _why_none(stored, round_))
    given = [*store.standing_assignments(run), *store.assignments(run, round_)]  # a pull moves a standing one on
    assignments = {(row.device, row.selection): row for row in given}
    updates: dict[str, list[UpdateRow]] = {}
    for update in store.updates_of_round(run, round_):
        updates.setdefault(update.update.assignment, []).append(update)
    told = [_selection(row, unpack(row.report), assignments, updates, device) for row in rows]
    if device is not None:
        told = [entry for entry in told if entry["devices"]]
        if not told:
            raise ConfigError(f"run {run!r}, round {round_ + 1}: no device {device!r} was known to the server then")
    return told


def explanation_lines(told: list[dict[str, Any]], run: str, width: int | None = None) -> list[str]:
    """The same for people: one table, with a line before each selection.

    Where that is wider than ``width`` characters, a paragraph per device, as long as it is.
    """
    figures = list(dict.fromkeys(name for entry in told for row in entry["devices"] for name in row["figures"]))
    rows = [[*_COLUMNS, *(f"~{name}" for name in figures)]]
    heads = {}
    for entry in told:
        chosen = sum(row["chosen"] for row in entry["devices"])
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["at_unix_s"]))
        heads[len(rows)] = (
            f"{run}, round {entry['round'] + 1}, attempt {entry['attempt'] + 1}, selection {entry['selection'] + 1} "
            f"({at}): {chosen} of {counted(len(entry['devices']), 'device')} chosen"
        )
        rows += [_line(row, figures) for row in entry["devices"]]
    title, *lines = table(rows)
    if width is not None and max(map(len, (title, *lines))) > width:
        return _listed(told, list(heads.values()), figures)
    out: list[str] = []
    for number, line in enumerate(lines, 1):
        if number in heads:
            out += [*([""] if out else []), heads[number], title]
        out.append(line)
    return [*out, "", _ESTIMATES] if figures else out


def _listed(told: list[dict[str, Any]], heads: list[str], figures: list[str]) -> list[str]:
    """The same as a paragraph per device, for where the table is too wide."""
    out: list[str] = []
    for head, entry in zip(heads, told, strict=True):
        out += [*([""] if out else []), head]
        for row in entry["devices"]:
            device, _, why, *rest = _line(row, figures)
            names = [*_COLUMNS[3:], *(f"~{name}" for name in figures)]
            known = [f"{name} {value}" for name, value in zip(names, rest, strict=True) if value != "-"]
            out += [
                f"{device} {'chosen' if row['chosen'] else 'not chosen'}: {why}",
                *(f"    {text}" for text in known),
            ]
    return [*out, "", _ESTIMATES] if figures else out


def _selection(
    row: SelectionRow,
    report: Report,
    assignments: dict[tuple[str, int], AssignmentRow],
    updates: dict[str, list[UpdateRow]],
    device: str | None,
) -> dict[str, Any]:
    known = sorted({*report.chosen, *report.notes, *report.unfit, *report.busy})
    names = [*sorted(report.chosen), *(name for name in known if name not in report.chosen)]
    entries = []
    for name in names if device is None else [name for name in names if name == device]:
        note, choice = report.notes.get(name), report.chosen.get(name)
        why = note.reason if note is not None else report.unfit.get(name) or report.busy.get(name)
        entry: dict[str, Any] = {"device": name, "chosen": choice is not None}
        entry["why"] = why or ("chosen" if choice is not None else "not chosen")
        entry["figures"] = {} if note is None else dict(note.figures)
        entry.update(dict.fromkeys(_OF_CHOSEN))
        if choice is not None:
            entry.update(_work(choice))
            assignment = assignments.get((name, row.number))
            if assignment is not None:
                entry["role"] = assignment.role
                entry["byte_budget"] = assignment.byte_budget
                entry["assignment"] = assignment.assignment
                entry["became"] = became(assignment, updates.get(assignment.assignment, []))
        entries.append(entry)
    return {
        "selection": row.number,
        "round": row.round,
        "attempt": row.attempt,
        "at_unix_s": row.at_unix_s,
        "devices": entries,
    }


def became(assignment: AssignmentRow, updates: list[UpdateRow]) -> str:
    """What became of an assignment, in words."""
    if assignment.standing:
        pulls = f", pulled {counted(assignment.sequence + 1, 'time')}" if assignment.sequence >= 0 else ""
        held = "holds" if assignment.status == "open" else "held"
        return f"{held} a standing assignment{pulls}"
    for update in updates:
        if update.counted_round is not None:
            late = update.counted_round - assignment.version
            when = f", {counted(late, 'version')} late, in round {update.counted_round + 1}" if late else ""
            return f"{'counted' if update.verdict == 'counted' else 'delivered'}{when}"
    refused = [update.reason for update in updates if update.verdict == "refused"]
    if refused:
        return f"refused: {refused[-1]}"
    if assignment.status == "open":
        return "at work, offline or late" if assignment.away else "at work"
    return f"{assignment.status}: {assignment.reason}" if assignment.reason else assignment.status


def _work(choice: Choice) -> dict[str, Any]:
    return {
        "role": choice.role,
        "steps": choice.steps,
        "epochs": None if choice.steps is not None else choice.epochs,
        "deadline_s": choice.deadline_s,
        "byte_budget": choice.byte_budget,
    }


def _line(entry: dict[str, Any], figures: list[str]) -> list[str]:
    work = "-"
    if entry["steps"] is not None:
        work = str(entry["steps"])
    elif entry["epochs"] is not None:
        work = counted(entry["epochs"], "epoch")
    deadline = "-" if entry["deadline_s"] is None else f"{entry['deadline_s']:g} s"
    values = [f"{entry['figures'][name]:.3g}" if name in entry["figures"] else "-" for name in figures]
    chosen = "yes" if entry["chosen"] else "no"
    return [
        entry["device"],
        chosen,
        entry["why"],
        entry["role"] or "-",
        work,
        deadline,
        entry["became"] or "-",
        *values,
    ]


def _none_chosen(store: Store, stored: StoredRun, round_: int) -> str:
    """Where the model of an anarchic run comes from that needed no selection; empty if it is of none."""
    row, standing = stored.row, store.standing_assignments(stored.row.run)
    if not standing or not max(0, row.round - SELECTION_ROUNDS_KEPT + 1) <= round_ <= row.round:
        return ""
    senders = sorted({update.update.device for update in store.updates_of_round(row.run, round_)})
    return (
        f"run {row.run!r}, round {round_ + 1}: nobody new was chosen in it; {counted(len(standing), 'device')} chosen "
        f"before decide themselves when they train, and its updates are from {', '.join(senders) or 'nobody yet'}; see "
        f"edge-coordinator explain {row.run} 1"
    )


def _why_none(stored: StoredRun, round_: int) -> str:
    row, where = stored.row, f"run {stored.row.run!r}, round {round_ + 1}"
    if not 0 <= round_ < stored.plan.rounds:
        return f"run {row.run!r} has rounds 1 to {stored.plan.rounds}, not {round_ + 1}"
    if round_ <= row.round - SELECTION_ROUNDS_KEPT:
        return f"{where}: its selections are no longer kept; those of the last {SELECTION_ROUNDS_KEPT} rounds are"
    if row.status != "running" and round_ >= row.round:
        return f"{where}: never began; the run is {row.status}"
    if round_ > row.round:
        return f"{where}: has not begun; the run is at round {row.round + 1}"
    if round_ == row.round:
        return f"{where}: nobody was asked yet; edge-coordinator status says what it waits for"
    return f"{where}: nobody was asked in it; it was made of updates that were still on their way"
