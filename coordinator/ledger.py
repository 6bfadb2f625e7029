"""The energy ledger: what every job drew, as its device said, and whether that was measured or modelled.

One row per job that reported its end, counted or not; a job that brought several updates (one was refused) has a row
for each. What a device says is bounded before it is stored: a figure that cannot be true is unknown, never a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.events import AssignmentRow, UpdateRow
    from edge_runtime.messages import EnergySource, EnergyUse

# Above what any training machine draws: a server with eight accelerators stays below, a wall socket gives 3.7 kW.
LARGEST_WATTS = 10_000.0
NO_UPDATE = -1  # sequence of the row of a job that ended without an update; of a standing assignment less than that
_LARGEST_MJ = 1 << 50  # however long a job may take: a database sums thousands of those
LONGEST_TEXT = 200  # characters of what a device says in words


class LedgerRow(msgspec.Struct, kw_only=True):
    """What one job drew, gross, in millijoules; None: unknown. Named by run, device, assignment and ``sequence``.

    ``sequence`` is that of its update, or ``NO_UPDATE``. ``round`` is the one that asked the device. ``train_mj``,
    ``compress_mj`` and ``other_mj`` (reading, loading, evaluating) were measured by ``sensor`` unless ``modelled``, and
    are ``doubtful`` where the device says so (it throttled, its sensor changed); ``radio_mj`` is always modelled.
    ``scope``, ``quality`` and ``covers`` are what the device announced of that sensor; None: nothing, or it is unknown
    here. ``stopped`` says why training ended early, ``note`` why a figure that the device sent is taken as unknown.
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
    doubtful: bool = False
    train_mj: int | None = None
    compress_mj: int | None = None
    other_mj: int | None = None
    radio_mj: int | None = None
    idle_mw: int | None = None
    train_ms: int | None = None
    stopped: str = ""
    note: str = ""


class EnergySums(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the ledger rows of one group (a round, a device) with the same ``modelled``; None: none was known.

    ``known_jobs``: of which it is known what training drew, or all of a job that did not come to train.
    """

    key: Any
    modelled: bool
    jobs: int
    known_jobs: int
    doubtful_jobs: int
    stopped_jobs: int
    train_mj: int | None
    compress_mj: int | None
    other_mj: int | None
    radio_mj: int | None


def ledger_row(
    assignment: AssignmentRow,
    energy: EnergyUse | None,
    sources: Mapping[str, EnergySource],
    *,
    elapsed_s: float,
    update: UpdateRow | None = None,
) -> LedgerRow:
    """The row of one job, that ended with ``update`` or without one.

    ``sources`` are what its device announced, now or before, by their sensors: the job names its own, and whatever the
    device measures with by now changes nothing about it. ``elapsed_s`` is the longest that the job can have taken: no
    figure may be more than ``LARGEST_WATTS`` over that time.
    """
    row = LedgerRow(
        run=assignment.run,
        device=assignment.device,
        assignment=assignment.assignment,
        sequence=_without_update(assignment) if update is None else update.update.sequence,
        round=assignment.round,
    )
    if update is not None:
        row.train_ms, row.stopped = update.meta.train_ms, update.meta.stopped[:LONGEST_TEXT]
    if energy is None:
        return row
    source = sources.get(energy.sensor[:LONGEST_TEXT])
    of_model = source is not None and "modelled" in (source.quality, source.scope)
    row.sensor = energy.sensor[:LONGEST_TEXT] or None
    row.modelled = energy.modelled or of_model
    if source is not None and row.modelled == of_model:
        row.scope, row.quality = source.scope[:LONGEST_TEXT], source.quality[:LONGEST_TEXT]
        row.covers = source.covers[:LONGEST_TEXT] or None
    elif row.modelled:  # what is known of its sensor, if anything, says nothing of a figure that a model had part in
        row.scope = row.quality = "modelled"
    most_mj = round(min(1000 * LARGEST_WATTS * max(0.0, elapsed_s), _LARGEST_MJ))
    impossible = []
    for name, most in (
        ("train_mj", most_mj),
        ("compress_mj", most_mj),
        ("other_mj", most_mj),
        ("radio_mj", most_mj),
        ("idle_mw", round(1000 * LARGEST_WATTS)),
    ):
        value = getattr(energy, name)
        if value is not None and value > most:
            impossible.append(f"{name.partition('_')[0]} {value / 1000:.3g} {'W' if name == 'idle_mw' else 'J'}")
            value = None
        setattr(row, name, value)
    row.doubtful = energy.doubtful and any(value is not None for value in _parts_mj(row))
    if impossible:
        row.note = (
            f"{', '.join(impossible)} of at most {elapsed_s:.0f} s: more than {LARGEST_WATTS:g} W, taken as unknown"
        )
    return row


def _without_update(assignment: AssignmentRow) -> int:
    """A standing assignment may have many jobs that ended so."""
    return NO_UPDATE - 1 - assignment.sequence if assignment.standing else NO_UPDATE


def energy_totals(sums: Iterable[EnergySums]) -> dict[str, Any]:
    """Joules of jobs from loading to compression, measured and modelled apart, and the radio's, which are modelled.

    Keys: ``joules``, ``modelled_joules``, ``radio_modelled_joules`` (None: nothing known), ``measured_jobs``,
    ``modelled_jobs``, ``unknown_jobs``, by what is known of their training, and ``doubtful_jobs`` among the known.
    """
    sums = list(sums)
    measured, modelled = [part for part in sums if not part.modelled], [part for part in sums if part.modelled]
    return {
        "joules": _joules(part for entry in measured for part in _parts_mj(entry)),
        "modelled_joules": _joules(part for entry in modelled for part in _parts_mj(entry)),
        "radio_modelled_joules": _joules(entry.radio_mj for entry in sums),
        "measured_jobs": sum(entry.known_jobs for entry in measured),
        "modelled_jobs": sum(entry.known_jobs for entry in modelled),
        "unknown_jobs": sum(entry.jobs - entry.known_jobs for entry in sums),
        "doubtful_jobs": sum(entry.doubtful_jobs for entry in sums),
    }


def grouped(sums: Iterable[EnergySums]) -> dict[Any, list[EnergySums]]:
    """Sums by their key."""
    groups: dict[Any, list[EnergySums]] = {}
    for entry in sums:
        groups.setdefault(entry.key, []).append(entry)
    return groups


def ledger_entry(
    row: LedgerRow, status: str, steps: int | None = None, steps_planned: int | None = None
) -> dict[str, Any]:
    """A row for people and programs, in joules; ``status`` is the verdict on its update, or "failed".

    ``steps`` are those that the update is made of, ``steps_planned`` those of the plan: None where that gives epochs,
    whose steps only the device can count, and where there is no update.
    """

    def of(value: int | None, *, modelled: bool) -> float | None:
        return None if value is None or row.modelled != modelled else value / 1000

    known = any(value is not None for value in _parts_mj(row))
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
        "other_joules": of(row.other_mj, modelled=False),
        "train_modelled_joules": of(row.train_mj, modelled=True),
        "compress_modelled_joules": of(row.compress_mj, modelled=True),
        "other_modelled_joules": of(row.other_mj, modelled=True),
        "radio_modelled_joules": None if row.radio_mj is None else row.radio_mj / 1000,
        "idle_watts": of(row.idle_mw, modelled=False),
        "idle_modelled_watts": of(row.idle_mw, modelled=True),
        "doubtful": row.doubtful,
        "train_seconds": None if row.train_ms is None else row.train_ms / 1000,
        "steps": steps,
        "steps_planned": None if steps is None else steps_planned,
        "stopped": row.stopped,
        "note": row.note,
    }


def _parts_mj(entry: LedgerRow | EnergySums) -> tuple[int | None, int | None, int | None]:
    return entry.train_mj, entry.compress_mj, entry.other_mj


def _joules(parts_mj: Iterable[int | None]) -> float | None:
    known = [value for value in parts_mj if value is not None]
    return sum(known) / 1000 if known else None
