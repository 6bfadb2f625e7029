"""Fleets of real devices with heartbeats, histories and requests, in few words."""

from __future__ import annotations

from random import Random

from coordinator.events import AssignmentRow, HistoryRow
from coordinator.fleet import Fleet
from coordinator.scheduling import Outcome, RoundRequest
from edge_runtime.messages import DatasetInfo, EnergyUse, Heartbeat, UpdateMeta
from tests.coordinator import helpers as h

BUNDLE = b"\x01\x02\x03\x04"


def name(number: int) -> str:
    return f"d{number:04d}"


def beat(**changes) -> Heartbeat:
    """A device at the charger with a step of 0.1 s and 1 J."""
    values = {"on_external_power": True, "bundle": BUNDLE, "step_us": 100_000, "step_uj": 1_000_000}
    return Heartbeat(**{**values, "up_kbit_s": 8000, "down_kbit_s": 8000, **changes})


def on_battery(percent: int, **changes) -> Heartbeat:
    return beat(on_external_power=False, battery_percent=percent, **changes)


def fleet(heartbeats, **changes) -> Fleet:
    """A device ``d0000``, ``d0001``... for every heartbeat; None: it never sent one. ``changes`` are of all states."""
    made = Fleet()
    values = {"battery_wh": 10.0, "datasets": [DatasetInfo(name="digits", samples=100)], **changes}
    for number, heartbeat in enumerate(heartbeats):
        made.announce(0.0, h.device(name(number), **values))
        if heartbeat is not None:
            made.measured(0.0, name(number), heartbeat)
    return made


def past(number: int, **changes) -> HistoryRow:
    values = {"asked": 1, "counted": 1, "last_round": 3, "loss_rms": 1.0, "samples": 100, "elapsed_s": 10.0}
    return HistoryRow(run="run", device=name(number), **{**values, **changes})


def histories(rows) -> dict[str, HistoryRow]:
    """By device; a row of None is left out."""
    return {row.device: row for row in rows if row is not None}


def plan(**changes):
    training = {"steps": 10, "min_steps": 2, **changes.pop("training", {})}
    return h.plan(training=h.Training(**training), **{"target": 4, "deadline_s": 100.0, **changes})


def request(count: int, total: int, *, seed: int = 0, **changes) -> RoundRequest:
    values = {"round_": 10, "attempt": 0, "plan": plan(), "bundle": BUNDLE, "up_bytes": 1000, "down_bytes": 1000}
    values |= {"candidates": [name(number) for number in range(total)], **changes}
    return RoundRequest(run="run", count=count, random=Random(seed), **values)


def chosen(selector, a_fleet, a_request) -> list[int]:
    """Numbers of the chosen devices."""
    return [int(choice.device[1:]) for choice in selector.select(0.0, a_fleet, a_request).choices]


def frequencies(selector, a_fleet, total, *, seeds, count, **changes) -> list[float]:
    """How often each device is chosen, over seeds."""
    hits = [0] * total
    for seed in range(seeds):
        for number in chosen(selector, a_fleet, request(count, total, seed=seed, **changes)):
            hits[number] += 1
    return [hit / seeds for hit in hits]


def outcome(number: int, *, samples=100, loss_rms=1.0, joules=None, failed=False, steps=None, **changes) -> Outcome:
    row = AssignmentRow(
        run="run",
        assignment=f"r0-{number}",
        device=name(number),
        round=0,
        version=0,
        steps=steps,
        model=h.blob(1),
        deadline_unix_s=1.0,
        assigned_unix_s=0.0,
    )
    energy = None if joules is None else EnergyUse(train_mj=int(joules * 1000))
    meta = UpdateMeta(round=0, model_version=0, samples=samples, steps=10, loss_rms=loss_rms, energy=energy)
    return Outcome(assignment=row, meta=None if failed else meta, elapsed_s=1.0, **changes)
