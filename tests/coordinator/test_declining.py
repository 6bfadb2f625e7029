"""Rounds with devices that decline or fail, and selectors that choose fewer: what a run learns of its devices."""

from __future__ import annotations

import pytest

from coordinator import events as e
from coordinator.histories import LONGEST_DECLINE_S, LONGEST_FAILURE_PAUSE_S
from coordinator.rounds import step
from coordinator.scheduling import Note, Selection
from coordinator.scheduling.explaining import unpack
from coordinator.scheduling.random import RandomSelector
from edge_runtime.messages import EnergyUse
from tests.coordinator import helpers as h


def open_round(plan, *names):
    """A run whose first round is open, its fleet, and the jobs by device."""
    state, fleet = h.start(plan), h.fleet(*names)
    effects = step(state, e.Tick(0.0), fleet)
    return state, fleet, {row.device: row for row in h.jobs(effects)}


def declines(row, now=1.0, declined_s=60.0, reason="only at night"):
    return e.JobReported(now, row.device, row.assignment, reason, rejected=True, declined_s=declined_s)


def test_who_declines_frees_its_place_at_once_and_has_not_failed():
    """Another one is asked; the device keeps its good name and is left alone for as long as it said."""
    state, fleet, jobs = open_round(h.plan(target=1, rounds=9), "a", "b")
    (first,) = jobs.values()
    (other,) = h.jobs(step(state, declines(first), fleet))
    row = state.histories[first.device]
    assert (row.failures, row.not_before_unix_s, state.assignments[first.assignment].status) == (0, 61.0, "declined")
    step(state, h.arrived(other, 2.0), fleet)
    (job,) = h.jobs(step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet))
    assert job.device == other.device


@pytest.mark.parametrize(("said_s", "least_s", "most_s"), [(0.0, 1.0, 1.0), (1e12, LONGEST_DECLINE_S, 22_000.0)])
def test_how_long_a_device_is_left_alone_is_bounded(said_s, least_s, most_s):
    """It can neither be asked in a loop nor disappear for ever."""
    state, fleet, jobs = open_round(h.plan(target=1), "a")
    step(state, declines(jobs["a"], 5.0, said_s), fleet)
    assert least_s <= state.histories["a"].not_before_unix_s - 5.0 <= most_s


def test_a_fleet_that_declines_all_night_is_asked_in_the_morning():
    """No attempt is used up; the round goes on when the owners' limits allow it."""
    state, fleet, jobs = open_round(h.plan(attempts=2), "a", "b")
    for row in jobs.values():
        step(state, declines(row, declined_s=9000.0), fleet)
    for now in range(10, 9000, 10):
        assert not h.jobs(step(state, e.Tick(float(now)), fleet))
    assert (state.run.status, state.run.attempt) == ("running", 0)
    assert len(h.jobs(step(state, e.Tick(9001.0), fleet))) == 2


def test_declining_twice_is_declining_once():
    """A report that is repeated, or comes after the update, changes nothing."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    step(state, h.arrived(jobs["a"], 1.0), fleet)
    assert step(state, declines(jobs["a"], 2.0), fleet) == []
    step(state, declines(jobs["b"], 2.0), fleet)
    assert step(state, declines(jobs["b"], 3.0), fleet) == []


def test_failing_devices_are_asked_less_and_less_but_never_not_at_all():
    """The pause doubles up to an hour; one good update and the device is as before."""
    state, fleet, jobs = open_round(h.plan(target=1, attempts=10_000, deadline_s=600.0, rounds=3), "a")
    job, now, pauses = jobs["a"], 0.0, []
    for _ in range(9):
        step(state, e.JobReported(now, "a", job.assignment, "out of memory"), fleet)
        pauses.append(state.histories["a"].not_before_unix_s - now)
        asked = []
        while not asked:
            now += 20.0
            asked = h.jobs(step(state, e.Tick(now), fleet))
        (job,) = asked
    assert pauses[:3] == [60.0, 120.0, 240.0]
    assert pauses[-1] == LONGEST_FAILURE_PAUSE_S
    step(state, h.arrived(job, now + 1.0), fleet)
    assert (state.histories["a"].failures, state.histories["a"].not_before_unix_s) == (0, 0.0)
    assert len(h.jobs(step(state, e.Aggregated(now + 2.0, 0, h.blob(20)), fleet))) == 1


def test_a_run_learns_what_its_devices_take():
    """Seconds and joules per step, time from job to update, loss and samples; averaged over jobs."""
    state, fleet, jobs = open_round(h.plan(target=1, rounds=3), "a")
    job = jobs["a"]
    for round_, (ms, mj) in enumerate([(2000, 4000), (4000, 8000)]):
        said = {"steps": 10, "train_ms": ms, "loss_rms": 0.5, "energy": EnergyUse(train_mj=mj)}
        step(state, h.arrived(job, 100.0 * round_ + 10.0, **said), fleet)
        effects = step(state, e.Aggregated(100.0 * round_ + 80.0, round_, h.blob(20 + round_)), fleet)
        (job,) = h.jobs(effects)
    row = state.histories["a"]
    assert (row.asked, row.counted, row.last_round, row.samples, row.loss_rms) == (3, 2, 2, 10, 0.5)
    assert (row.step_s, row.step_j) == (pytest.approx(0.3), pytest.approx(0.6))
    assert row.elapsed_s == pytest.approx((10.0 + 30.0) / 2)
    assert row in h.one(e.Save, effects).rows


def select_only(monkeypatch, *choose):
    """A selector that chooses one number of devices after another, then all that are wanted."""
    counts = list(choose)

    def select(_self, _now, _fleet, request):
        count = counts.pop(0) if counts else request.count
        names = request.candidates[: min(count, request.count)]
        notes = {name: Note("first by name", {"score": 2.0}) for name in names}
        return Selection(choices=[request.choice(name) for name in names], notes=notes)

    monkeypatch.setattr(RandomSelector, "select", select)


def test_a_selector_may_choose_fewer_than_wanted(monkeypatch):
    """Their number is then the round's goal; only those that fail or leave are replaced."""
    select_only(monkeypatch, 2)
    state, fleet, jobs = open_round(h.plan(target=4, over_commit=1.5), *"abcdefg")
    assert sorted(jobs) == ["a", "b"]
    assert (state.goal, state.places) == (2, 2)
    assert not h.jobs(step(state, e.Tick(50.0), fleet))
    (other,) = h.jobs(step(state, e.JobReported(51.0, "a", jobs["a"].assignment, "x"), fleet))
    step(state, h.arrived(jobs["b"], 52.0), fleet)
    assert h.of(e.Aggregate, step(state, h.arrived(other, 53.0), fleet))
    jobs = h.jobs(step(state, e.Aggregated(54.0, 0, h.blob(20)), fleet))
    assert (len(jobs), state.goal) == (6, 4)  # the next round is as the plan says


def test_a_selector_that_chooses_nobody_is_asked_again_after_a_while(monkeypatch):
    """Not at every event."""
    select_only(monkeypatch, 0, 0)
    state, fleet, jobs = open_round(h.plan(target=2), "a", "b")
    assert not jobs
    chosen = [len(h.jobs(step(state, e.Tick(now), fleet))) for now in (0.1, 0.9, 1.0, 1.5, 2.0)]
    assert chosen == [0, 0, 0, 0, 2]
    assert state.run.next_selection == 3


def test_every_selection_is_stored_with_its_reasons(monkeypatch):
    """Who was chosen and why, who cannot take part, who is busy or left alone."""
    select_only(monkeypatch)
    state, fleet, jobs = open_round(h.plan(target=2, minimum=1, rounds=3), "a", "b")
    fleet.announce(0.0, h.device("c", methods=[]))
    step(state, h.arrived(jobs["a"], 1.0), fleet)
    effects = step(state, declines(jobs["b"], 2.0), fleet)
    fleet.announce(3.0, h.device("d"))
    effects = step(state, e.DeviceJoined(3.0, "d"), fleet)
    assert not h.jobs(effects)  # all who were asked have answered: the round is closed
    effects = step(state, e.Aggregated(4.0, 0, h.blob(20)), fleet)
    (row,) = [row for row in h.one(e.Save, effects).rows if isinstance(row, e.SelectionRow)]
    assert (row.number, row.round, row.attempt, row.at_unix_s) == (1, 1, 0, 4.0)
    report = unpack(row.report)
    assert sorted(report.chosen) == ["a", "d"]
    assert report.notes["a"] == Note("first by name", {"score": 2.0})
    assert report.unfit == {"c": "lacks method 'fedavg'"}
    assert report.busy == {"b": "declined, left alone for another 58 s"}


def test_a_choice_is_bounded_by_the_plan(monkeypatch):
    """Deadlines, roles and steps of a plug-in cannot go beyond what plan, method and device allow."""
    plan = h.plan(target=3)
    odd = {"a": {"deadline_s": 1e9}, "b": {"deadline_s": float("nan"), "role": "anchor"}, "c": {"steps": 3}}

    def select(_self, _now, _fleet, request):
        choices = [request.choice(name) for name in ("a", "b", "c", "c", "stranger")]
        changed = [type(choice)(**{**as_dict(choice), **odd.get(choice.device, {})}) for choice in choices]
        return Selection(choices=changed[:3] + changed[4:])

    def as_dict(choice):
        return {name: getattr(choice, name) for name in choice.__struct_fields__}

    monkeypatch.setattr(RandomSelector, "select", select)
    state, _, jobs = open_round(plan, "a", "b", "c")
    assert sorted(jobs) == ["a", "b", "c"]
    assert [jobs[name].deadline_unix_s for name in "abc"] == [100.0, 100.0, 100.0]
    assert jobs["b"].role == "trainer"
    assert (jobs["c"].steps, jobs["c"].epochs) == (3, None)
    assert (jobs["a"].steps, jobs["a"].epochs) == (None, 1)
    assert state.run.places == 0 or state.places >= 3
