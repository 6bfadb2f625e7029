"""Rounds with devices that decline or fail, and selectors that choose fewer: what a run learns of its devices."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator import events as e
from coordinator.asking import NOBODY_KEPT
from coordinator.histories import LONGEST_DECLINE_S, LONGEST_FAILURE_PAUSE_S
from coordinator.rounds import step
from coordinator.run_state import RunState
from coordinator.scheduling import Note, Selection
from coordinator.scheduling.explaining import unpack
from coordinator.scheduling.notes import Marks
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


def test_a_small_run_uses_its_attempts_though_all_its_devices_failed():
    """Nobody waits for the end of a pause that is longer than the run has patience: the next attempt asks again."""
    state, fleet, jobs = open_round(h.plan(target=2, minimum=2, deadline_s=1.0, attempts=30), "a", "b")
    step(state, h.arrived(jobs["b"], 0.1), fleet)
    job, now, asked = jobs["a"], 0.1, 1
    while not state.ended and now < 20.0:
        effects = step(state, e.JobReported(now, "a", job.assignment, "out of memory"), fleet)
        while not h.jobs(effects) and not state.ended and now < 20.0:
            now += 0.05
            effects = step(state, e.Tick(now), fleet)
        for row in h.jobs(effects):
            job, asked = row, asked + 1
    assert (state.run.status, asked) == ("failed", 30)
    assert "out of memory" in state.run.reason


def test_a_fleet_leaves_those_alone_that_failed():
    """Where enough others are there, a further attempt asks nobody before its pause is over."""
    state, fleet, jobs = open_round(h.plan(target=1, minimum=1, deadline_s=1.0, attempts=30), *"abcd")
    (job,) = jobs.values()
    failed, now = {}, 0.0
    for _ in range(4):
        failed[job.device] = job
        effects = step(state, e.JobReported(now, job.device, job.assignment, "out of memory"), fleet)
        asked = h.jobs(effects)
        if asked:
            (job,) = asked
            assert job.device not in failed
    assert len(failed) == 4  # all there are: only now one of them is asked again
    effects = [effect for tick in range(10) for effect in step(state, e.Tick(0.05 * tick), fleet)]
    assert len({row.device for row in h.jobs(effects)} & failed.keys()) == 1


def test_a_round_that_lacks_devices_asks_those_that_failed():
    """After its patience; in the round before they failed, and an hour is long."""
    plan = h.plan(target=3, minimum=2, rounds=3, deadline_s=100.0)
    state, fleet, jobs = open_round(plan, "a", "b", "c")
    state.histories["c"].failures = 9
    step(state, e.JobReported(1.0, "c", jobs["c"].assignment, "out of memory"), fleet)
    for name in "ab":
        effects = step(state, h.arrived(jobs[name], 2.0), fleet)
    assert h.of(e.Aggregate, effects)
    fleet.announce(2.5, h.device("b", online=False))
    step(state, e.DeviceLeft(2.5, "b"), fleet)
    asked = h.jobs(step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet))
    ticks = {now: [row.device for row in h.jobs(step(state, e.Tick(float(now)), fleet))] for now in range(4, 30)}
    assert not asked
    assert [names for names in ticks.values() if names] == [["a", "c"]]
    assert next(now for now, names in ticks.items() if names) == 13


def test_a_device_that_declined_after_failures_is_not_asked_early():
    """Its owner's limits stand, however few others there are."""
    state, fleet, jobs = open_round(h.plan(target=1, attempts=9, deadline_s=1.0), "a")
    step(state, e.JobReported(0.0, "a", jobs["a"].assignment, "out of memory"), fleet)
    (job,) = [row for tick in range(4) for row in h.jobs(step(state, e.Tick(0.1 * tick), fleet))]
    step(state, declines(job, 0.5, 60.0), fleet)
    effects = [effect for now in range(1, 60) for effect in step(state, e.Tick(float(now)), fleet)]
    assert not h.jobs(effects)
    assert not h.of(e.Finished, effects)
    assert len(h.jobs(step(state, e.Tick(61.0), fleet))) == 1


def test_a_buffered_run_asks_those_that_failed_when_nothing_else_is_left():
    """Every deadline without an update is an attempt, not an hour of waiting."""
    state, fleet, jobs = open_round(h.plan(mode="buffered", target=1, deadline_s=1.0, attempts=5), "a")
    job, now, asked = jobs["a"], 0.0, 1
    while not state.ended and now < 20.0:
        effects = step(state, e.JobReported(now, "a", job.assignment, "out of memory"), fleet)
        while not h.jobs(effects) and not state.ended and now < 20.0:
            now += 0.25
            effects = step(state, e.Tick(now), fleet)
        for row in h.jobs(effects):
            job, asked = row, asked + 1
    assert state.run.status == "failed"
    assert asked >= 5


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


def select_only(monkeypatch, *choose, wanted=None):
    """A selector that chooses one number of devices after another, then all that are wanted."""
    counts = list(choose)

    def select(_self, _now, _fleet, request):
        count = counts.pop(0) if counts else request.count
        names = request.candidates[: min(count, request.count)]
        notes = {name: Note("first by name", {"score": 2.0}) for name in names}
        return Selection(choices=[request.choice(name) for name in names], notes=notes, wanted=wanted)

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


@pytest.mark.parametrize(
    ("wanted", "chosen", "goal", "places"),
    [
        (3, 5, 3, 5),
        (None, 3, 3, 3),
        (None, 5, 4, 5),
        (9, 5, 4, 5),
        (3, 2, 2, 2),
        (-5, 5, 4, 5),
        (1, 5, 2, 5),
        (2, 6, 2, 6),
    ],
)
def test_a_selector_says_how_many_updates_close_its_round(monkeypatch, wanted, chosen, goal, places):
    """Its own over-commitment may differ from the plan's; bounded by minimum, target and the number chosen."""
    select_only(monkeypatch, chosen, wanted=wanted)
    state, fleet, jobs = open_round(h.plan(target=4, minimum=2, over_commit=1.5, rounds=3), *"abcdefg")
    assert (len(jobs), state.goal, state.places) == (chosen, goal, places)
    for number, row in enumerate(jobs.values(), 1):
        effects = step(state, h.arrived(row, 1.0), fleet)
        assert bool(h.of(e.Aggregate, effects)) == (number == goal)
        if number == goal:
            break
    rows = [state.run, *state.assignments.values(), *state.updates.values(), *state.histories.values()]
    assert RunState.from_rows(state.plan, rows).goal == goal
    select_only(monkeypatch)
    step(state, e.Aggregated(2.0, 0, h.blob(20)), fleet)
    assert state.goal == 4  # the next round is another matter


def test_what_a_selector_wants_holds_where_too_few_are_there(monkeypatch):
    """Those who come later fill the places for what is wanted, not for the plan's target."""
    select_only(monkeypatch, wanted=4)
    state, fleet, jobs = open_round(h.plan(target=8, minimum=2, over_commit=1.5), "a", "b")
    assert not jobs
    assert len(h.jobs(step(state, e.Tick(10.0), fleet))) == 2
    assert (state.goal, state.places) == (4, 6)
    asked = []
    for number, name in enumerate("cdefghij"):
        fleet.announce(11.0, h.device(name))
        asked += h.jobs(step(state, e.DeviceJoined(11.0 + number, name), fleet))
    assert len(asked) == 4


def test_a_selector_that_chooses_nobody_is_asked_again_after_a_while(monkeypatch):
    """Not at every event, and soon only where a device came."""
    select_only(monkeypatch, 0, 0)
    state, fleet, jobs = open_round(h.plan(target=2), "a", "b")
    assert not jobs
    chosen = [len(h.jobs(step(state, e.Tick(now), fleet))) for now in (0.1, 1.0, 2.0, 9.0, 10.0, 11.0)]
    assert chosen == [0, 0, 0, 0, 0, 0]
    assert state.run.next_selection == 2
    fleet.announce(11.1, h.device("c"))
    assert len(h.jobs(step(state, e.DeviceJoined(11.1, "c"), fleet))) == 2
    assert state.run.next_selection == 3


def test_a_run_that_waits_all_night_stores_a_reason_once(monkeypatch):
    """What says the same as the selection before is not kept again, and of what keeps changing only so much."""
    said = ["waits for {score:.0f} %"]

    def select(_self, now, _fleet, request):
        marks = Marks(request.candidates)
        marks.figure("score", now)
        marks.mark(np.ones(len(request.candidates), bool), said[0])
        return Selection(choices=[], notes=marks.table())

    monkeypatch.setattr(RandomSelector, "select", select)
    state, fleet = h.start(h.plan(target=2)), h.fleet("a", "b")

    def stored(since, until):
        effects = [effect for now in range(since, until) for effect in step(state, e.Tick(float(now)), fleet)]
        return [row for save in h.of(e.Save, effects) for row in save.rows if isinstance(row, e.SelectionRow)]

    assert len(stored(0, 2000)) == 1
    said[0] = "is too hot"
    assert len(stored(2000, 4000)) == 1
    rows = 0
    for turn in range(200):
        said[0] = f"reason {turn}"
        rows += len(stored(4000 + 20 * turn, 4020 + 20 * turn))
    assert rows == NOBODY_KEPT - 2


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
