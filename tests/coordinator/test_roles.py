"""Roles and tables in the round machine: anchors, and rows per device of server methods that keep such."""

from __future__ import annotations

import msgspec
import pytest

from coordinator import events as e
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from coordinator.scheduling import Selection
from coordinator.scheduling.random import RandomSelector
from tests.coordinator import helpers as h


@pytest.fixture(autouse=True)
def all_anchors(monkeypatch):
    """A selector that wants every device to be an anchor."""

    def select(_self, _now, _fleet, request):
        choices = [request.choice(name) for name in request.candidates]
        return Selection(choices=[msgspec.structs.replace(choice, role="anchor") for choice in choices])

    monkeypatch.setattr(RandomSelector, "select", select)


def asked(plan):
    """A run with an able and an older device: state, fleet and jobs by device."""
    state, fleet = h.start(plan), h.fleet("old")
    fleet.announce(0.0, h.device("able", abilities=["anchor"], methods=["fedavg", "fedamd"]))
    fleet.announce(0.0, h.device("old", methods=["fedavg", "fedamd"]))
    return state, fleet, {row.device: row for row in h.jobs(step(state, e.Tick(0.0), fleet))}


def test_only_able_devices_are_anchors_and_only_where_the_method_knows_them():
    """The others train as ever."""
    _, _, jobs = asked(h.plan(method="fedamd", server_method="fedamd"))
    assert {name: row.role for name, row in jobs.items()} == {"able": "anchor", "old": "trainer"}
    _, _, jobs = asked(h.plan())
    assert {name: row.role for name, row in jobs.items()} == {"able": "trainer", "old": "trainer"}


def test_roles_and_rows_go_into_the_aggregate_and_come_out_of_it():
    """Also after a restart: the same rows of the devices in the round, and how many there may be."""
    state, fleet, jobs = asked(h.plan(method="fedamd", server_method="fedamd", rounds=5))
    step(state, h.arrived(jobs["able"], 1.0, steps=0), fleet)
    effect = h.one(e.Aggregate, step(state, h.arrived(jobs["old"], 2.0), fleet))
    assert effect.roles == {jobs["able"].assignment: "anchor"}
    assert (effect.table, effect.members) == ({}, 2)
    made = e.Aggregated(3.0, 0, h.blob(20), hyper={"lr": 0.5}, table={"able": h.blob(70)})
    effects = step(state, made, fleet)
    assert e.TableRow(run="run", device="able", blob=h.blob(70), round=0) in h.one(e.Save, effects).rows
    assert state.run.hyper == {"lr": 0.5}
    for row in h.jobs(effects):
        step(state, h.arrived(row, 4.0), fleet)
    rows = [
        state.run,
        *state.assignments.values(),
        *state.updates.values(),
        *state.histories.values(),
        *state.table.values(),
    ]
    rebuilt = RunState.from_rows(state.plan, rows)
    effect = h.one(e.Aggregate, resume(rebuilt))
    assert effect == h.one(e.Aggregate, resume(state))
    assert (effect.table, effect.members) == ({"able": h.blob(70)}, 2)
