"""The energy ledger: what every job drew, as its device said, and whether that was measured or modelled.

One row per job that reported its end, counted or not; a job that brought several updates (one was refused) has a row
for each. What a device says is bounded before it is stored: a figure that cannot be true is unknown, never a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.events import AssignmentRow, UpdateRow
    from edge_runtime.messages import EnergySource, EnergyUse

# Above what any training machine draws: a server with eight accelerators stays below, a wall socket gives 3.7 kW.
LARGEST_WATTS = 10_000.0
NO_UPDATE = -1  # sequence of the row of a job that ended without an update
_LARGEST_MJ = 1 << 50  # however long a job may take: a database sums thousands of those
_LONGEST_TEXT = 200  # characters of what a device says in words


class LedgerRow(msgspec.Struct, kw_only=True):
    """What one job drew, gross, in millijoules; None: unknown. Named by run, device, assignment and ``sequence``.

    ``sequence`` is that of its update, or ``NO_UPDATE``. ``round`` is the one that asked the device. ``train_mj`` and
    ``compress_mj`` were measured by ``sensor`` unless ``modelled``; ``radio_mj`` is always modelled. ``stopped`` says
    why training ended early, ``note`` why a figure that the device sent is taken as unknown.
    """

    run: str
    device: str
    assignment: str
    sequence: int
    round: int
    sensor: str | None = None
    scope: str | None = None
    quality: str | None = None
    covers: str | None = None
    modelled: bool = False
    train_mj: int | None = None
    compress_mj: int | None = None
    radio_mj: int | None = None
    idle_mw: int | None = None
    train_ms: int | None = None
    stopped: str = ""
    note: str = ""


class EnergySums(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the ledger rows of one group (a round, a device) with the same ``modelled``; None: none was known."""

    key: Any
    modelled: bool
    jobs: int
    known_jobs: int
    stopped_jobs: int
    train_mj: int | None
    compress_mj: int | None
    radio_mj: int | None


def ledger_row(
    assignment: AssignmentRow,
    energy: EnergyUse | None,
    source: EnergySource | None,
    *,
    elapsed_s: float,
    update: UpdateRow | None = None,
) -> LedgerRow:
    """The row of one job, that ended with ``update`` or without one.

    ``source`` is what its device announced. ``elapsed_s`` is the longest that the job can have taken: no figure may be
    more than ``LARGEST_WATTS`` over that time.
    """
    row = LedgerRow(
        run=assignment.run,
        device=assignment.device,
        assignment=assignment.assignment,
        sequence=NO_UPDATE if update is None else update.update.sequence,
        round=assignment.round,
    )
    if update is not None:
        row.train_ms, row.stopped = update.meta.train_ms, update.meta.stopped[:_LONGEST_TEXT]
    if source is not None:
        row.sensor, row.scope = source.sensor[:_LONGEST_TEXT], source.scope[:_LONGEST_TEXT]
        row.quality, row.covers = source.quality[:_LONGEST_TEXT], source.covers[:_LONGEST_TEXT] or None
    if energy is None:
        return row
    announced_modelled = source is not None and "modelled" in (source.quality, source.scope)
    row.modelled = energy.modelled or announced_modelled
    if row.modelled and not announced_modelled:  # its sensor failed it, and what it announced says nothing of this job
        row.sensor, row.scope, row.quality, row.covers = None, "modelled", "modelled", None
    most_mj = round(min(1000 * LARGEST_WATTS * max(0.0, elapsed_s), _LARGEST_MJ))
    impossible = []
    for name, most in (
        ("train_mj", most_mj),
        ("compress_mj", most_mj),
        ("radio_mj", most_mj),
        ("idle_mw", round(1000 * LARGEST_WATTS)),
    ):
        value = getattr(energy, name)
        if value is not None and value > most:
            impossible.append(f"{name.partition('_')[0]} {value / 1000:.3g} {'W' if name == 'idle_mw' else 'J'}")
            value = None
        setattr(row, name, value)
    if impossible:
        row.note = (
            f"{', '.join(impossible)} of at most {elapsed_s:.0f} s: more than {LARGEST_WATTS:g} W, taken as unknown"
        )
    return row


def energy_totals(sums: Iterable[EnergySums]) -> dict[str, Any]:
    """Joules of training and compression together, measured and modelled apart, and the radio's, which are modelled.

    Keys: ``joules``, ``modelled_joules``, ``radio_modelled_joules`` (None: nothing known) and ``measured_jobs``,
    ``modelled_jobs``, ``unknown_jobs``, by what is known of their training.
    """
    sums = list(sums)
    measured, modelled = [part for part in sums if not part.modelled], [part for part in sums if part.modelled]
    return {
        "joules": _joules(part for entry in measured for part in (entry.train_mj, entry.compress_mj)),
        "modelled_joules": _joules(part for entry in modelled for part in (entry.train_mj, entry.compress_mj)),
        "radio_modelled_joules": _joules(entry.radio_mj for entry in sums),
        "measured_jobs": sum(entry.known_jobs for entry in measured),
        "modelled_jobs": sum(entry.known_jobs for entry in modelled),
        "unknown_jobs": sum(entry.jobs - entry.known_jobs for entry in sums),
    }


def grouped(sums: Iterable[EnergySums]) -> dict[Any, list[EnergySums]]:
    """Sums by their key."""
    groups: dict[Any, list[EnergySums]] = {}
    for entry in sums:
        groups.setdefault(entry.key, []).append(entry)
    return groups


def ledger_entry(row: LedgerRow, status: str) -> dict[str, Any]:
    """A row for people and programs, in joules; ``status`` is the verdict on its update, or "failed"."""

    def of(value: int | None, *, modelled: bool) -> float | None:
        return None if value is None or row.modelled != modelled else value / 1000

    known = any(value is not None for value in (row.train_mj, row.compress_mj))
    return {
        "device": row.device,
        "round": row.round,
        "assignment": row.assignment,
        "status": status,
        "sensor": row.sensor if known else None,
        "scope": row.scope if known else None,
        "quality": row.quality if known else None,
        "covers": row.covers if known else None,
        "train_joules": of(row.train_mj, modelled=False),
        "compress_joules": of(row.compress_mj, modelled=False),
        "train_modelled_joules": of(row.train_mj, modelled=True),
        "compress_modelled_joules": of(row.compress_mj, modelled=True),
        "radio_modelled_joules": None if row.radio_mj is None else row.radio_mj / 1000,
        "idle_watts": of(row.idle_mw, modelled=False),
        "idle_modelled_watts": of(row.idle_mw, modelled=True),
        "train_seconds": None if row.train_ms is None else row.train_ms / 1000,
        "stopped": row.stopped,
        "note": row.note,
    }


def _joules(parts_mj: Iterable[int | None]) -> float | None:
    known = [value for value in parts_mj if value is not None]
    return sum(known) / 1000 if known else None
