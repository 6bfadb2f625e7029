"""Buffered runs (FedBuff): so many devices at work at any time, a model of every ``target`` updates."""

from __future__ import annotations

from coordinator import events as e
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from tests.coordinator import helpers as h


def running(*names, **changes):
    """A run that has asked its first devices, its fleet, and the jobs by device."""
    state = h.start(h.plan(**{"mode": "buffered", "rounds": 5, **changes}))
    fleet = h.fleet(*names)
    effects = step(state, e.Tick(0.0), fleet)
    return state, fleet, {row.device: row for row in h.jobs(effects)}


def test_a_place_that_becomes_free_is_given_on_at_once():
    """Whoever delivers or fails is replaced, from the newest model, and never by a device with an undecided update."""
    state, fleet, jobs = running("a", "b", "c", "d", concurrency=2, target=3)
    assert len(jobs) == 2
    first, second = jobs.values()
    (third,) = h.jobs(step(state, h.arrived(first, 1.0), fleet))
    assert third.device not in jobs
    (fourth,) = h.jobs(step(state, e.JobReported(2.0, second.device, second.assignment, "too hot"), fleet))
    assert fourth.device not in {*jobs, third.device}
    assert state.at_work == 2


def test_the_target_makes_a_model_of_whatever_came():
    """Updates of any version count, weighted by their staleness; a slow device's one is of the version it got."""
    state, fleet, jobs = running("a", "b", "c", concurrency=3, target=2, staleness_exponent=1.0)
    step(state, h.arrived(jobs["a"], 1.0), fleet)
    effects = step(state, h.arrived(jobs["b"], 2.0), fleet)
    assert [row.weight for row in h.one(e.Aggregate, effects).updates] == [10.0, 10.0]
    again = {row.device: row for row in h.jobs(step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet))}
    assert {name: row.version for name, row in again.items()} == {"a": 1, "b": 1}
    step(state, h.arrived(jobs["c"], 4.0), fleet)
    effects = step(state, h.arrived(again["a"], 5.0), fleet)
    aggregate = h.one(e.Aggregate, effects)
    assert {row.update.device: row.weight for row in aggregate.updates} == {"a": 10.0, "c": 5.0}
    rows = h.one(e.Save, step(state, e.Aggregated(6.0, 1, h.blob(21)), fleet)).rows
    record = next(row for row in rows if isinstance(row, e.RoundRow))
    assert (record.updates, record.late_updates) == (2, 1)


def test_a_device_that_takes_too_long_loses_its_place_and_still_counts():
    """Past its deadline another one is asked; its own update is taken when it comes."""
    state, fleet, jobs = running("a", "b", concurrency=1, target=2)
    (slow,) = jobs.values()
    assert not h.jobs(step(state, e.Tick(99.0), fleet))
    (other,) = h.jobs(step(state, e.Tick(100.0), fleet))
    assert other.device != slow.device
    assert state.assignments[slow.assignment].away
    step(state, h.arrived(other, 101.0), fleet)
    assert len(h.one(e.Aggregate, step(state, h.arrived(slow, 150.0), fleet)).updates) == 2


def test_a_fleet_smaller_than_the_target_goes_on_with_the_minimum():
    """All have delivered and wait for a verdict: after the usual patience that is enough."""
    state, fleet, jobs = running("a", "b", target=5, minimum=2)
    step(state, h.arrived(jobs["a"], 1.0), fleet)
    step(state, h.arrived(jobs["b"], 2.0), fleet)
    assert not h.of(e.Aggregate, step(state, e.Tick(11.0), fleet))
    assert len(h.one(e.Aggregate, step(state, e.Tick(12.0), fleet)).updates) == 2


def test_updates_while_a_model_is_made_go_into_the_next_one():
    """Nobody is asked meanwhile, since the newest model is about to be old."""
    state, fleet, jobs = running("a", "b", concurrency=2, target=1)
    step(state, h.arrived(jobs["a"], 1.0), fleet)
    effects = step(state, h.arrived(jobs["b"], 2.0), fleet)
    assert [type(effect) for effect in effects] == [e.Save, e.SendDone]
    effects = step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    assert [row.update.device for row in h.one(e.Aggregate, effects).updates] == ["b"]


def test_a_run_without_any_answer_fails_with_its_reason():
    """Jobs are repeated after every deadline in which nothing came; then it says what it waited for."""
    state, fleet, jobs = running("a", "b", attempts=3)
    for silence in (1, 2):
        again = h.jobs(step(state, e.Tick(100.0 * silence), fleet))
        assert {row.assignment for row in again} == {row.assignment for row in jobs.values()}
    finished = h.one(e.Finished, step(state, e.Tick(300.0), fleet))
    assert finished.status == "failed"
    assert finished.reason == "no update came for 3 times the deadline of 100 s, 2 devices never answered"


def test_an_update_proves_that_a_run_lives():
    """Silence counts from the last update."""
    state, fleet, jobs = running(*"abc", attempts=2, target=3, minimum=3)
    step(state, e.Tick(100.0), fleet)
    step(state, h.arrived(jobs["a"], 150.0), fleet)
    assert not h.of(e.Finished, step(state, e.Tick(240.0), fleet))
    step(state, e.Tick(250.0), fleet)
    assert h.of(e.Finished, step(state, e.Tick(350.0), fleet))


def test_a_fleet_that_declines_is_waited_for():
    """Declining is no failure: the run waits, however often, and goes on when devices may train again."""
    state, fleet, jobs = running("a", attempts=2, target=1)
    (job,) = jobs.values()
    event = e.JobReported(1.0, "a", job.assignment, "only at night", rejected=True, declined_s=3000.0)
    step(state, event, fleet)
    for now in range(100, 3000, 100):
        assert not h.jobs(step(state, e.Tick(float(now)), fleet))
    assert state.run.status == "running"
    (again,) = h.jobs(step(state, e.Tick(3001.0), fleet))
    assert h.one(e.Aggregate, step(state, h.arrived(again, 3002.0), fleet))


def test_a_restart_changes_nothing():
    """Rebuilt from its rows the run has the same devices at work, and tells them again."""
    state, fleet, jobs = running("a", "b", "c", concurrency=2, target=2)
    (first, _) = jobs.values()
    step(state, h.arrived(first, 1.0), fleet)
    rows = [state.run, *state.assignments.values(), *state.updates.values(), *state.histories.values()]
    rebuilt = RunState.from_rows(state.plan, rows)
    assert rebuilt.at_work == state.at_work == 2
    assert [row.device for row in h.jobs(resume(rebuilt))] == [row.device for row in h.jobs(resume(state))]
    assert step(rebuilt, e.Tick(2.0), fleet) == []
