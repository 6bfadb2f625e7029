"""Devices that take jobs and never answer, or always too late: they fade, and come back when they answer again."""

from __future__ import annotations

import heapq

import pytest

from coordinator import events as e
from coordinator.plan import Training
from coordinator.rounds import step
from coordinator.scheduling import SELECTORS
from coordinator.scheduling.random import RandomSelector
from tests.coordinator import helpers as h
from tests.coordinator.scheduling import world as w

DEVICES, BAD, TICK_S, HEARTBEAT_S = 30, w.name(0), 20.0, 300.0


class Rounds:
    """A run by a clock: honest devices answer after 20 to 90 s, the bad one after ``bad`` seconds (None: never)."""

    def __init__(self, selector, **changes):
        values = {"target": 4, "over_commit": 1.3, "rounds": 10_000, "attempts": 50, "deadline_s": 600.0, **changes}
        self.plan = h.plan(selector=selector, training=Training(steps=10, min_steps=2), **values)
        self.fleet = w.fleet([w.beat(bundle=b"\0\0\0\0")] * DEVICES)
        self.state = h.start(self.plan)
        self.now, self.bad, self.rounds, self._beats_s = 0.0, None, 0, 0.0
        self.asked: dict[str, int] = {}
        self._arrivals: list = []
        self.feed(e.Tick(0.0))

    def feed(self, event):
        effects = step(self.state, event, self.fleet)
        for row in h.jobs(effects):
            number = int(row.device[1:])
            delay_s = self.bad if row.device == BAD else 20.0 + 10.0 * ((7 * number + self.rounds) % 8)
            if row.assigned_unix_s == self.now:  # not one that is told again
                self.asked[row.device] = self.asked.get(row.device, 0) + 1
                if delay_s is not None:
                    heapq.heappush(self._arrivals, (self.now + delay_s, row.assignment, row))
        for effect in h.of(e.Aggregate, effects):
            self.rounds += 1
            self.feed(e.Aggregated(self.now, effect.round, h.blob(1000 + self.rounds)))

    def play(self, rounds):
        """So many rounds; how often the bad device was asked in them, and an honest one in the mean."""
        before, ends = dict(self.asked), self.rounds + rounds
        while self.rounds < ends:
            assert not self.state.ended, self.state.run.reason
            self.now = min([self.now + TICK_S, *(entry[0] for entry in self._arrivals[:1])])
            if self.now >= self._beats_s + HEARTBEAT_S:
                self._beats_s = self.now
                for number in range(DEVICES):
                    self.fleet.measured(self.now, w.name(number), w.beat(bundle=b"\0\0\0\0"))
            while self._arrivals and self._arrivals[0][0] <= self.now:
                row = heapq.heappop(self._arrivals)[2]
                self.feed(h.arrived(row, self.now, samples=100, steps=row.steps, train_ms=1000, loss_rms=1.0))
            self.feed(e.Tick(self.now))
        asked = {name: count - before.get(name, 0) for name, count in self.asked.items()}
        bad = asked.pop(BAD, 0)
        return bad, sum(asked.values()) / (DEVICES - 1)


@pytest.mark.parametrize("max_staleness", [0, 5])
@pytest.mark.parametrize("selector", SELECTORS.names())
def test_a_silent_device_fades_and_comes_back(selector, max_staleness):
    """It never says that it failed; still it is asked far less than the others, until it answers again."""
    run = Rounds(selector, max_staleness=max_staleness)
    bad, honest = run.play(200)
    assert run.state.histories[BAD].failures >= 3
    assert 1 <= bad < 0.5 * honest
    run.bad = 20.0
    run.play(150)  # time enough to be asked once more
    assert run.state.histories[BAD].failures == 0
    bad, honest = run.play(100)
    assert bad > 0.4 * honest


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("selector", SELECTORS.names())
def test_a_device_that_is_always_too_late_fades_and_comes_back(selector, max_staleness):
    """Its updates are refused as stale: after a dozen in a row it is given less and less work for nothing."""
    run = Rounds(selector, max_staleness=max_staleness)
    run.bad = 590.0
    run.play(200)
    bad, honest = run.play(200)
    assert bad < 0.5 * honest
    run.bad = 20.0
    run.play(250)
    assert run.state.histories[BAD].failures == 0


def opened(monkeypatch, **changes):
    """A run of a round after the other, its fleet, the jobs by device, and what the selector was told of failures."""
    told = []
    monkeypatch.setattr(
        RandomSelector, "observe", lambda _self, device, outcome, _memory: told.append((device, outcome))
    )
    plan = h.plan(**{"target": 1, "over_commit": 2.0, "rounds": 9, "max_staleness": 1, **changes})
    state, fleet = h.start(plan), h.fleet("a", "b")
    jobs = {row.device: row for row in h.jobs(step(state, e.Tick(0.0), fleet))}
    return state, fleet, jobs, told


def close_rounds(state, fleet, job, count):
    """The device of ``job`` answers for so many rounds; the effects of the last."""
    for _ in range(count):
        now = state.clock.now + 1.0
        step(state, h.arrived(job, now), fleet)
        effects = step(state, e.Aggregated(now + 1.0, state.run.round, h.blob(50 + state.run.round)), fleet)
        job = next(row for row in h.jobs(effects) if row.device == job.device)
    return effects


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_a_slow_device_that_is_cut_off_has_not_failed(monkeypatch, mode):
    """Over-commitment ends its job before the deadline; once its late update came, it counts as slow, not as silent."""
    state, fleet, jobs, told = opened(monkeypatch, mode=mode)
    close_rounds(state, fleet, jobs["a"], 1)
    job = next(row for row in state.assignments.values() if row.device == "a" and row.status == "open")
    effects = close_rounds(state, fleet, job, 1)
    assert state.assignments[jobs["b"].assignment].status == "cancelled"
    row = state.histories["b"]
    assert (row.failures, row.not_before_unix_s, row.cut_off) == (0, 0.0, 4)
    assert row in h.one(e.Save, effects).rows
    for _ in range(2):  # the second changes nothing
        effects = step(state, h.arrived(jobs["b"], state.clock.now + 1.0), fleet)
        assert "stale" in h.one(e.SendVerdict, effects).reason
        assert (row.failures, row.cut_off) == (0, 1)
    assert row.elapsed_s is not None
    assert not [entry for entry in told if entry[1].meta is None]


@pytest.mark.parametrize(("seconds", "cut_off", "failures"), [(0.0, 0, 0), (0.0, 8, 1), (1000.0, 0, 1)])
def test_the_third_silence_in_a_row_and_a_deadline_that_passed_are_failures(monkeypatch, seconds, cut_off, failures):
    """Whoever never says a word of what it was asked fades; the selector is told once."""
    state, fleet, jobs, told = opened(monkeypatch)
    close_rounds(state, fleet, jobs["a"], 1)
    row = state.histories["b"]
    row.cut_off = cut_off
    state.assignments[jobs["b"].assignment].deadline_unix_s -= seconds
    job = next(row for row in state.assignments.values() if row.device == "a" and row.status == "open")
    close_rounds(state, fleet, job, 1)
    assert row.failures == failures
    assert (row.not_before_unix_s > state.clock.now) == bool(failures)
    assert len([outcome for _, outcome in told if outcome.meta is None]) == failures


def test_a_late_update_that_counts_clears_the_failures(monkeypatch):
    """Whatever was held against the device before."""
    state, fleet, jobs, _ = opened(monkeypatch)
    close_rounds(state, fleet, jobs["a"], 1)
    row = state.histories["b"]
    row.failures, row.not_before_unix_s = 3, state.clock.now + 500.0
    step(state, h.arrived(jobs["b"], state.clock.now + 1.0), fleet)
    assert (row.failures, row.not_before_unix_s, row.counted) == (0, 0.0, 1)


def test_the_end_of_a_run_blames_nobody(monkeypatch):
    """Jobs that are cancelled because the run ends were not failed."""
    state, fleet, _, told = opened(monkeypatch)
    step(state, e.StopRequested(5.0), fleet)
    assert {row.status for row in state.assignments.values()} <= {"cancelled"}
    assert [row.failures for row in state.histories.values()] == [0, 0]
    assert told == []
