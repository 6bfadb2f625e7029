"""What a run has come to, as plain numbers: for the command line, for scripts, for summary files."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from coordinator.budget import FLOAT_BYTES
from coordinator.evaluation_numbers import accuracy, mean_loss
from coordinator.fleet import requirement, unfit_row
from coordinator.ledger import energy_totals, grouped, ledger_entry
from edge_runtime.messages import DECLINES

if TYPE_CHECKING:
    from coordinator.events import DeviceRow, RoundRow, RunRow
    from coordinator.ledger import EnergySums
    from coordinator.store import Store, StoredRun
    from edge_runtime.messages import Heartbeat

_HEARTBEAT = (  # what is shown of it
    "battery_percent",
    "reserve_percent",
    "on_external_power",
    "temperature_c",
    "temperature_margin_c",
    "link_metered",
    "up_kbit_s",
    "down_kbit_s",
    "availability_percent",
    "data_left_mb",
    "joules_left",
)
_SOURCE = ("sensor", "scope", "quality", "covers")


def run_summary(store: Store, run: str, *, now: float | None = None) -> dict[str, Any]:
    """One run in numbers.

    Keys: ``accuracy`` and ``test_loss`` (latest on the test set), ``best_accuracy``, ``initial_accuracy``,
    ``device_accuracy`` (latest on the devices' hold-outs), ``rounds`` (closed) of ``rounds_planned``, ``bytes_up`` and
    ``bytes_down`` (MQTT packets of this run), ``bytes_bundle`` (of ``bytes_down``), ``ratio_up`` and ``ratio_down``
    (bytes of the same updates, or of a model for each of them, in float32 alone, over those bytes; without bundles),
    ``bytes_complete`` (false where the coordinator was restarted and packets before that are not counted: such a round
    is in no ratio of the run and has none),
    ``encode_cpu_ms`` and ``written_bytes`` (means per update, as devices reported them), ``elements`` (of the model),
    ``seconds`` (to the end, to ``now`` for a running run if given, else to the last round), ``devices`` (that were
    asked), ``declined_jobs``, ``updates`` by verdict, ``energy`` (of all jobs that reported their end; see
    :func:`coordinator.ledger.energy_totals`), ``stopped_jobs`` (that trained less than was asked), and ``history`` with
    one entry per round, its energy being that of the jobs which this round gave out. What was not measured is None.

    Raises:
        UnknownRunError: no such run.
    """
    stored = store.run(run)
    row, rounds = stored.row, store.rounds(run)
    energy = store.energy(run, "round")
    by_round = grouped(energy)
    history = [_round(entry, row.elements, by_round.get(entry.round, [])) for entry in rounds]
    measured = [entry["accuracy"] for entry in history if entry["accuracy"] is not None]
    initial = accuracy(row.initial_test)
    last = rounds[-1].closed_unix_s if rounds else row.submitted_unix_s
    end = row.ended_unix_s if row.ended_unix_s is not None else max(now or 0.0, last)
    return {
        "run": row.run,
        "plan": stored.plan.name,
        "status": row.status,
        "reason": row.reason,
        "phase": row.phase,
        "rounds": len(rounds),
        "rounds_planned": stored.plan.rounds,
        "version": row.version,
        "mode": stored.plan.participation.mode,
        "accuracy": _latest(history, "accuracy") if measured else initial,
        "best_accuracy": max(measured, default=initial),
        "initial_accuracy": initial,
        "test_loss": _latest(history, "test_loss") if history else mean_loss(row.initial_test),
        "device_accuracy": _latest(history, "device_accuracy"),
        "train_loss": _latest(history, "train_loss"),
        "elements": row.elements,
        **_costs(rounds, row.elements, row),
        "seconds": end - row.submitted_unix_s,
        "samples": sum(entry.samples for entry in rounds),
        "devices": store.participants(run),
        "declined_jobs": store.declined(run),
        "updates": {"counted": 0, "refused": 0, "pending": 0, **store.update_counts(run)},
        "late_updates": sum(entry.late_updates for entry in rounds),
        **_energy(energy),
        "history": history,
    }


def run_ledger(store: Store, run: str, *, ended_early: int | None = None) -> list[dict[str, Any]]:
    """What every job of a run drew, one flat entry per job; see :func:`coordinator.ledger.ledger_entry`.

    ``ended_early``: only the last so many that ended before their last step.
    """
    planned = store.run(run).plan.training.steps
    return [
        ledger_entry(row, status, None if meta is None else meta.steps, planned)
        for row, status, meta in store.ledger(run, ended_early=ended_early)
    ]


def round_progress(store: Store, stored: StoredRun) -> dict[str, int]:
    """The open round: devices ``asked``, and how many of them ``delivered``, ``failed``, ``declined``, are ``open``.

    In a run without rounds ``open`` are all that are at work or hold a standing assignment, and ``delivered`` the
    updates that the next model will be made of.
    """
    run, round_ = stored.row.run, stored.row.round
    rows = store.assignments(run, round_)
    counts = {"asked": len(rows), "delivered": 0, "failed": 0, "declined": 0, "open": 0}
    for row in rows:
        key = {"received": "delivered", "open": "open", "declined": "declined"}.get(row.status, "failed")
        counts[key] += 1
    if stored.plan.participation.mode != "synchronous":
        counts["open"], counts["delivered"] = store.open_assignments(run), store.updates_waiting(run, round_)
    return counts


def failures(store: Store, stored: StoredRun) -> list[dict[str, Any]]:
    """Jobs of the open round, or of the last one, that ended without an update: ``device``, ``round``, ``reason``.

    ``declined``: the device did not begin, because of its owner's limits.
    """
    last = min(stored.row.round, stored.plan.rounds - 1)
    return [
        {"device": row.device, "round": row.round, "reason": row.reason, "declined": row.status == "declined"}
        for row in store.assignments(stored.row.run, last)
        if row.status in ("failed", "declined")
    ]


def device_report(store: Store, stored: StoredRun | None = None) -> list[dict[str, Any]]:
    """The devices as the server last knew them; with a run, also why a device cannot take part, and what it drew.

    ``left_alone``: the running runs (or the run given) that do not ask a device now, ``for_s`` seconds more, since it
    ``declined`` or else failed.
    """
    runs = store.runs() if stored is None else [stored]
    alone = _left_alone(store, [entry.row.run for entry in runs if entry.row.status == "running"])
    if stored is None:
        return [{**_device(row, ""), "left_alone": alone.get(row.device, [])} for row in store.devices()]
    need = requirement(stored.plan, stored.row.model.size_bytes)
    drawn = grouped(store.energy(stored.row.run, "device"))
    return [
        {
            **_device(row, unfit_row(row, need)),
            "left_alone": alone.get(row.device, []),
            **_energy(drawn.get(row.device, [])),
        }
        for row in store.devices()
    ]


def _left_alone(store: Store, runs: list[str]) -> dict[str, list[dict[str, Any]]]:
    """By device."""
    now, found = time.time(), dict[str, list[dict[str, Any]]]()
    for run in runs:
        for row in store.histories(run):
            if row.not_before_unix_s > now:
                pause = {"run": run, "for_s": row.not_before_unix_s - now, "declined": row.declined}
                found.setdefault(row.device, []).append(pause)
    return found


def _device(row: DeviceRow, unfit: str) -> dict[str, Any]:
    heartbeat, source = row.heartbeat, row.state.energy
    return {
        "device": row.device,
        "online": row.online,
        "last_contact_unix_s": row.last_contact_unix_s,
        "platform": row.state.platform,
        "datasets": {entry.name: entry.samples for entry in row.state.datasets},
        "heartbeat": None if heartbeat is None else _heartbeat(heartbeat),
        "energy_source": None if source is None else {name: getattr(source, name) for name in _SOURCE},
        "conflict": row.conflict,
        "unfit": unfit,
    }


def _heartbeat(heartbeat: Heartbeat) -> dict[str, Any]:
    """``declines`` is the owner's limit for which the device would decline any job now; empty: none."""
    code = heartbeat.declines
    limit = DECLINES[code] if code < len(DECLINES) else "a limit that this version does not know"
    return {**{name: getattr(heartbeat, name) for name in _HEARTBEAT}, "declines": limit}


def _costs(rounds: list[RoundRow], elements: int, run: RunRow | None = None) -> dict[str, Any]:
    """Bytes of rounds, and of the run after them, their ratio to float32, and what devices said about their updates."""
    updates = sum(row.updates for row in rounds)
    known = [row for row in rounds if row.bytes_complete]
    up, down, bundle = _moved(rounds, run)
    known_up, known_down, known_bundle = _moved(known, run)
    dense = FLOAT_BYTES * elements * sum(row.updates for row in known)
    return {
        "bytes_up": up,
        "bytes_down": down,
        "bytes_bundle": bundle,
        "bytes_complete": len(known) == len(rounds) and (run is None or run.bytes_complete),
        "ratio_up": round(dense / known_up, 2) if dense and known_up else None,
        "ratio_down": round(dense / (known_down - known_bundle), 2) if dense and known_down > known_bundle else None,
        "encode_cpu_ms": round(sum(row.encode_cpu_ms for row in rounds) / updates, 2) if updates else None,
        "written_bytes": round(sum(row.written_bytes for row in rounds) / updates) if updates else None,
    }


def _moved(rounds: list[RoundRow], run: RunRow | None) -> tuple[int, int, int]:
    """Bytes up, down, and of the bundle."""
    parts: list[RoundRow | RunRow] = [*rounds] if run is None else [*rounds, run]
    bundle = sum(row.bytes_bundle for row in rounds)
    return sum(part.bytes_up for part in parts), sum(part.bytes_down for part in parts), bundle


def _round(row: RoundRow, elements: int, energy: list[EnergySums]) -> dict[str, Any]:
    return {
        "round": row.round,
        "version": row.version,
        "seconds": row.closed_unix_s - row.opened_unix_s,
        "updates": row.updates,
        "late_updates": row.late_updates,
        "samples": row.samples,
        **_costs([row], elements),
        **_energy(energy),
        "train_loss": row.train_loss,
        "test_loss": mean_loss(row.test),
        "accuracy": accuracy(row.test),
        "device_loss": mean_loss(row.devices),
        "device_accuracy": accuracy(row.devices),
    }


def _energy(sums: list[EnergySums]) -> dict[str, Any]:
    return {"energy": energy_totals(sums), "stopped_jobs": sum(entry.stopped_jobs for entry in sums)}


def _latest(history: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if entry[key] is not None), None)
