"""Anarchic runs: devices hold standing assignments, and choose themselves when they train, and how much."""

from __future__ import annotations

import msgspec
import pytest

from coordinator import events as e
from coordinator.fleet import Fleet
from coordinator.job_message import make_job, make_standing
from coordinator.ledger import LedgerRow
from coordinator.plan import Training, Uplink, check_mode
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from edge_runtime.errors import ConfigError
from edge_runtime.messages import EnergyUse
from tests.coordinator import helpers as h


def running(*names, codecs=("raw",), elements=0, **changes):
    """A run whose devices have their standing assignments, for 2 to 10 steps; by device."""
    training = Training(steps=10, min_steps=2)
    plan = h.plan(**{"mode": "anarchic", "rounds": 5, "training": training, **changes})
    state, fleet = h.start(plan, elements=elements), Fleet()
    for name in names:
        fleet.announce(0.0, h.device(name, abilities=["standing"], codecs=list(codecs)))
    effects = step(state, e.Tick(0.0), fleet)
    return state, fleet, {effect.assignment.device: effect.assignment for effect in h.of(e.SendStanding, effects)}


def pull(state, fleet, row, sequence, *, now=1.0, steps=5, device=None):
    """What follows from a pull."""
    return step(state, e.Pulled(now, device or row.device, row.assignment, sequence, steps), fleet)


def next_model(state, fleet, now=9.0):
    """The open round's model is there."""
    return step(state, e.Aggregated(now, state.run.round, h.blob(20 + state.run.round)), fleet)


def test_every_able_device_gets_a_standing_assignment_and_none_is_told_to_train():
    """Those that do not know such assignments get none; one that joins later gets one too."""
    state, fleet, standing = running("a", "b")
    fleet.announce(0.0, h.device("old"))
    assert sorted(standing) == ["a", "b"]
    assert not h.jobs(step(state, e.DeviceJoined(1.0, "old"), fleet))
    fleet.announce(2.0, h.device("c", abilities=["standing"]))
    effects = step(state, e.DeviceJoined(2.0, "c"), fleet)
    assert h.one(e.SendStanding, effects).assignment.device == "c"
    assert not h.jobs(effects)


def test_concurrency_limits_how_many_hold_one():
    """And one who leaves makes place for another."""
    state, fleet, standing = running("a", "b", "c", concurrency=2)
    assert len(standing) == 2
    gone = next(iter(standing))
    fleet.announce(1.0, h.device(gone, online=False, abilities=["standing"]))
    effects = step(state, e.DeviceLeft(1.0, gone), fleet)
    assert h.one(e.SendStanding, effects).assignment.device not in standing


def test_a_pull_gets_the_newest_model_for_the_steps_that_the_device_chose():
    """Within what the plan allows; repeated, it gets the same job."""
    state, fleet, standing = running("a", "b", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0, steps=5))
    assert (job.sequence, job.steps, job.version, job.pulled) == (0, 5, 0, True)
    assert h.jobs(pull(state, fleet, standing["a"], 0, steps=7)) == [job]
    for chosen, given in ((1, 2), (10_000, 10)):
        state, fleet, standing = running("a")
        assert h.jobs(pull(state, fleet, standing["a"], 0, steps=chosen))[0].steps == given


def test_every_target_updates_make_a_model_and_a_device_goes_on_by_number():
    """Each pull is an update of its own with the next number; all of them count once."""
    state, fleet, standing = running("a", "b", target=2)
    for sequence in range(3):
        jobs = [h.jobs(pull(state, fleet, standing[name], sequence, now=sequence))[0] for name in "ab"]
        assert [job.version for job in jobs] == [sequence, sequence]
        step(state, h.arrived(jobs[0], sequence=sequence), fleet)
        effects = step(state, h.arrived(jobs[1], sequence=sequence), fleet)
        names = [row.update for row in h.one(e.Aggregate, effects).updates]
        assert [(name.device, name.sequence) for name in names] == [("a", sequence), ("b", sequence)]
        verdicts = h.of(e.SendVerdict, next_model(state, fleet))
        assert [verdict.counted for verdict in verdicts] == [True, True]
    assert [row.status for row in state.assignments.values()] == ["open", "open"]
    assert len(state.updates) == 2  # only the last of each stay in memory


def test_nothing_is_pulled_before_the_verdict():
    """A device with an undecided update is told again that it is durable."""
    state, fleet, standing = running("a", "b", target=2)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    step(state, h.arrived(job), fleet)
    assert pull(state, fleet, standing["a"], 1) == [e.SendDone(h.update_id(job))]


@pytest.mark.parametrize(("sequence", "kind"), [(0, e.AnswerFromStore), (2, e.SendVerdict)])
def test_only_the_update_pulled_last_is_taken(sequence, kind):
    """An earlier one is answered from the store, one that was never pulled refused; nothing of it is stored."""
    state, fleet, standing = running("a", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    step(state, h.arrived(job), fleet)
    next_model(state, fleet)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 1))
    effects = step(state, h.arrived(job, sequence=sequence), fleet)
    assert [type(effect) for effect in effects] == [kind]


def test_an_update_of_another_version_than_pulled_is_refused():
    """The device must have started from what it was given."""
    state, fleet, standing = running("a", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    effects = step(state, h.arrived(job, model_version=3), fleet)
    assert "from model version 3" in h.one(e.SendVerdict, effects).reason
    assert state.assignments[job.assignment].status == "open"


def test_who_pulls_and_never_delivers_may_pull_again_after_the_deadline():
    """Before it the same job is owed; after it the next number gets a new one, and the old one counts no more."""
    state, fleet, standing = running("a", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    assert h.jobs(pull(state, fleet, standing["a"], 1, now=50.0)) == [job]
    (other,) = h.jobs(pull(state, fleet, standing["a"], 1, now=102.0))
    assert other.sequence == 1
    assert not h.one(e.AnswerFromStore, step(state, h.arrived(job, 103.0), fleet)).ends
    assert h.of(e.Aggregate, step(state, h.arrived(other, 104.0, sequence=1), fleet))


def delivered(state, fleet, job, now):
    """Its update is taken, and counts at once."""
    step(state, h.arrived(job, now, sequence=job.sequence), fleet)
    next_model(state, fleet, now)


def test_a_pull_before_its_interval_is_answered_when_it_is_due():
    """Said again or not, by a clock that is wrong or a device that wants more than its share: one job, in time."""
    state, fleet, standing = running("a", target=1, interval_s=50.0)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0, now=10.0))
    delivered(state, fleet, job, 11.0)
    for now in (12.0, 30.0, 59.9):
        assert pull(state, fleet, standing["a"], 1, now=now, steps=7) == []
        assert not h.jobs(step(state, e.Tick(now), fleet))
    (job,) = h.jobs(step(state, e.Tick(60.0), fleet))
    assert (job.sequence, job.steps, job.version, job.assigned_unix_s) == (1, 7, 1, 60.0)
    assert not h.jobs(step(state, e.Tick(61.0), fleet))
    delivered(state, fleet, job, 62.0)
    assert h.jobs(pull(state, fleet, standing["a"], 2, now=110.0))  # in time: at once


def test_nobody_counts_more_often_than_the_interval_allows():
    """One device pulls whenever it may not, the others as they should: all have the same number of updates."""
    names = ["eager", *"abc"]
    state, fleet, standing = running(*names, target=2, rounds=500, interval_s=100.0)
    counts, sequences = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for second in range(0, 4000, 2):
        now = float(second)
        events = [step(state, e.Tick(now), fleet)]
        for number, name in enumerate(names):
            if name == "eager" or second % 104 == 4 * number:
                events.append(pull(state, fleet, standing[name], sequences[name], now=now))
        for job in {row.device: row for effects in events for row in h.jobs(effects)}.values():
            counts[job.device] += 1
            sequences[job.device] += 1
            if h.of(e.Aggregate, step(state, h.arrived(job, now, sequence=job.sequence), fleet)):
                next_model(state, fleet, now)
    assert counts["eager"] <= 4000 / 100
    assert min(counts.values()) >= 38


def test_an_early_pull_of_a_device_that_left_is_forgotten():
    """It says it again when it is back; and none is answered once the run is over."""
    state, fleet, standing = running("a", "b", target=1, interval_s=50.0)
    for name in "ab":
        (job,) = h.jobs(pull(state, fleet, standing[name], 0, now=10.0))
        delivered(state, fleet, job, 11.0)
        pull(state, fleet, standing[name], 1, now=12.0)
    fleet.announce(13.0, h.device("a", online=False, abilities=["standing"]))
    step(state, e.DeviceLeft(13.0, "a"), fleet)
    assert [row.device for row in h.jobs(step(state, e.Tick(60.0), fleet))] == ["b"]
    fleet.announce(70.0, h.device("a", session="s2", abilities=["standing"]))
    assert not h.jobs(step(state, e.DeviceJoined(70.0, "a"), fleet))
    (job,) = h.jobs(pull(state, fleet, standing["a"], 1, now=71.0))
    delivered(state, fleet, job, 72.0)
    pull(state, fleet, standing["a"], 2, now=73.0)
    step(state, e.StopRequested(74.0), fleet)
    assert not h.jobs(step(state, e.Tick(200.0), fleet))


def test_who_pulls_and_never_delivers_has_failed():
    """At its next pull, or when what it pulled is too old to count; once each."""
    state, fleet, standing = running("a", "b", target=1, max_staleness=0)
    pull(state, fleet, standing["a"], 0)
    pull(state, fleet, standing["a"], 1, now=102.0)
    assert state.histories["a"].failures == 1
    (job,) = h.jobs(pull(state, fleet, standing["b"], 0, now=103.0))
    delivered(state, fleet, job, 104.0)
    assert (state.histories["a"].failures, state.histories["b"].failures) == (2, 0)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 2, now=300.0))
    delivered(state, fleet, job, 301.0)
    assert state.histories["a"].failures == 0


def test_a_failed_or_declined_pull_leaves_the_assignment():
    """Only what its owner forbids or what failed is over; the next number may be pulled at once."""
    state, fleet, standing = running("a", target=1)
    for sequence, event in enumerate([{}, {"rejected": True, "declined_s": 60.0}]):
        (job,) = h.jobs(pull(state, fleet, standing["a"], sequence))
        step(state, e.JobReported(2.0, "a", job.assignment, "too hot", **event), fleet)
        row = state.assignments[job.assignment]
        assert (row.status, row.pulled, row.reason) == ("open", False, "too hot")
    assert state.histories["a"].failures == 1


def test_a_device_that_joins_again_hears_what_is_due():
    """The number of its next update; and the job that it pulled and has not answered."""
    state, fleet, standing = running("a", target=2)
    plan, run = state.plan, state.run
    effects = step(state, e.DeviceJoined(1.0, "a"), fleet)
    assert make_standing(plan, run, h.one(e.SendStanding, effects).assignment, chunk_bytes=1000).sequence == 0
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    for due in (step(state, e.DeviceJoined(2.0, "a"), fleet), resume(state)):
        message = make_standing(plan, run, h.one(e.SendStanding, due).assignment, chunk_bytes=1000)
        assert (message.sequence, message.min_steps, message.max_steps) == (0, 2, 10)
        assert h.jobs(due) == [job]
    sent = make_job(plan, run, job, state.model_of(job), now=2.0, chunk_bytes=1000)
    assert (sent.sequence, sent.steps, sent.epochs, sent.role) == (0, 5, None, "trainer")
    step(state, h.arrived(job), fleet)
    effects = step(state, e.DeviceJoined(3.0, "a"), fleet)
    assert make_standing(plan, run, h.one(e.SendStanding, effects).assignment, chunk_bytes=1000).sequence == 1
    assert not h.jobs(effects)


def test_a_number_from_before_is_answered_with_the_next_one():
    """A device that was restored from an old copy learns where it is."""
    state, fleet, standing = running("a", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 7))
    step(state, h.arrived(job, sequence=7), fleet)
    next_model(state, fleet)
    (told,) = pull(state, fleet, standing["a"], 3)
    assert make_standing(state.plan, state.run, told.assignment, chunk_bytes=1000).sequence == 8


def test_pulls_of_nothing_are_answered_and_those_of_others_ignored():
    """Who pulls what is over is told so; nobody pulls for somebody else."""
    state, fleet, standing = running("a", "b", target=1)
    stranger = e.Pulled(1.0, "a", "r0-99", 0, 5)
    assert h.one(e.SendCancel, step(state, stranger, fleet)).assignment == "r0-99"
    assert pull(state, fleet, standing["a"], 0, device="b") == []
    step(state, e.StopRequested(2.0), fleet)
    assert h.one(e.SendCancel, pull(state, fleet, standing["a"], 0)).reason.startswith("run has ended")


def test_a_verdict_says_whether_anything_more_is_wanted_of_its_assignment():
    """Not while the run goes on, whatever is refused; yes of what is unknown, of others', and once the run is over."""
    state, fleet, standing = running("a", "b", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    assert not h.one(e.SendVerdict, step(state, h.arrived(job, sequence=4), fleet)).ends
    assert not h.one(e.SendVerdict, step(state, h.arrived(job, samples=0), fleet)).ends
    others, unknown = (msgspec.structs.replace(job, **change) for change in ({"device": "b"}, {"assignment": "r0-99"}))
    assert h.one(e.SendVerdict, step(state, h.arrived(others), fleet)).ends
    assert h.one(e.AnswerFromStore, step(state, h.arrived(unknown), fleet)).ends
    (job,) = h.jobs(pull(state, fleet, standing["b"], 0))
    step(state, e.StopRequested(2.0), fleet)
    assert h.one(e.SendVerdict, step(state, h.arrived(job, 3.0), fleet)).ends
    assert all(verdict.ends for verdict in h.of(e.SendVerdict, step(state, e.DeviceJoined(4.0, "b"), fleet)))


def test_a_pull_too_old_to_count_is_over():
    """Its update is refused by name, its model is not sent again, and the device may pull the next."""
    state, fleet, standing = running("a", "b", target=1, max_staleness=0)
    (old,) = h.jobs(pull(state, fleet, standing["a"], 0))
    (job,) = h.jobs(pull(state, fleet, standing["b"], 0))
    step(state, h.arrived(job), fleet)
    next_model(state, fleet)
    assert not h.jobs(step(state, e.DeviceJoined(10.0, "a"), fleet))
    assert "stale" in h.one(e.SendVerdict, step(state, h.arrived(old, 11.0), fleet)).reason
    assert h.jobs(pull(state, fleet, standing["a"], 1, now=12.0))[0].version == 1


def test_silence_is_no_failure_where_nobody_pulled():
    """Devices choose their moments: a run without any pull waits; owed updates that never come end it."""
    state, fleet, standing = running("a", attempts=2, target=1)
    for now in range(100, 2000, 100):
        assert not h.of(e.Finished, step(state, e.Tick(float(now)), fleet))
    pull(state, fleet, standing["a"], 0, now=2000.0)
    effects = [effect for now in (2100.0, 2200.0, 2300.0) for effect in step(state, e.Tick(now), fleet)]
    assert "1 device never answered" in h.one(e.Finished, effects).reason


def test_a_restart_changes_nothing():
    """Old pulls, the last update and its verdict are where they were."""
    state, fleet, standing = running("a", "b", target=1, max_staleness=0, rounds=9)
    for sequence in range(4):
        (job,) = h.jobs(pull(state, fleet, standing["a"], sequence))
        step(state, h.arrived(job, sequence=sequence), fleet)
        next_model(state, fleet)
    rows = [state.run, *state.assignments.values(), *state.updates.values(), *state.histories.values()]
    rebuilt = RunState.from_rows(state.plan, rows)
    assert rebuilt.assignments == state.assignments
    assert rebuilt.updates == state.updates
    assert {row.device for row in rebuilt.assignments.values()} == {"a", "b"}


def test_every_failed_pull_has_its_row_in_the_ledger():
    """What each of them drew is known, though none brought an update."""
    state, fleet, standing = running("a", target=1)
    rows = []
    for sequence in range(2):
        (job,) = h.jobs(pull(state, fleet, standing["a"], sequence))
        failed = e.JobReported(2.0, "a", job.assignment, "too hot", energy=EnergyUse(train_mj=5 + sequence))
        rows += [row for row in h.one(e.Save, step(state, failed, fleet)).rows if isinstance(row, LedgerRow)]
    assert [(row.sequence, row.train_mj) for row in rows] == [(-2, 5), (-3, 6)]


def test_a_budget_that_warms_up_is_that_of_the_pull():
    """Not of the round in which the assignment was given, weeks ago."""
    uplink = Uplink(codec="topk", target_ratio=100.0, warmup_rounds=3)
    state, fleet, standing = running("a", target=1, uplink=uplink, rounds=9, codecs=["topk", "raw"], elements=10_000)
    budgets = []
    for sequence in range(4):
        (job,) = h.jobs(pull(state, fleet, standing["a"], sequence))
        budgets.append(job.byte_budget)
        step(state, h.arrived(job, sequence=sequence), fleet)
        next_model(state, fleet)
    assert budgets[0] > budgets[1] > budgets[2] > budgets[3] == 400


def test_a_job_told_again_after_its_deadline_gets_a_whole_one():
    """Its update may still count; with a second left no device would begin."""
    state, fleet, standing = running("a", target=1)
    (job,) = h.jobs(pull(state, fleet, standing["a"], 0))
    model = state.model_of(job)
    left = [
        make_job(state.plan, state.run, job, model, now=now, chunk_bytes=1000).deadline_s for now in (1.0, 61.0, 500.0)
    ]
    assert left == [100.0, 40.0, 100.0]


@pytest.mark.parametrize(
    ("rules", "training", "reason"),
    [
        ({"mode": "anarchic"}, Training(epochs=1), "needs training.steps"),
        ({"mode": "synchronous", "concurrency": 3}, Training(epochs=1), "concurrency is for mode"),
        ({"mode": "buffered", "interval_s": 3.0}, Training(epochs=1), "interval_s is for mode"),
        ({"mode": "anarchic"}, Training(steps=3, min_steps=4), "min_steps is above"),
    ],
)
def test_keys_that_do_not_fit_the_mode_are_refused(rules, training, reason):
    """The message names the key."""
    plan = h.plan(training=training, **rules)
    with pytest.raises(ConfigError, match=reason):
        check_mode(plan)
    check_mode(msgspec.structs.replace(plan, training=Training(steps=3), participation=h.plan().participation))


def test_an_interval_longer_than_the_deadline_is_no_silence():
    """Devices that train once an hour, as the plan says, do not fail it, and two of them make a model of two."""
    rules = {"mode": "anarchic", "target": 2, "interval_s": 3600.0, "deadline_s": 60.0, "attempts": 2}
    state, fleet, standing = running("a", "b", **rules)
    effects = []
    for sequence, start in ((0, 0.0), (1, 3700.0)):
        for name, late in (("a", 1.0), ("b", 3000.0)):
            for now in range(int(start), int(start + late), 20):
                effects += step(state, e.Tick(float(now)), fleet)
            (job,) = h.jobs(pull(state, fleet, standing[name], sequence, now=start + late))
            effects += step(state, h.arrived(job, start + late + 5.0, sequence=sequence), fleet)
        assert len(h.one(e.Aggregate, effects).updates) == 2
        effects = step(state, e.Aggregated(start + 3010.0, sequence, h.blob(20 + sequence)), fleet)
    assert state.run.status != "failed"


def test_silence_in_an_anarchic_run_ends_it_after_intervals_and_deadlines():
    """The reason names both."""
    rules = {"mode": "anarchic", "target": 1, "interval_s": 100.0, "deadline_s": 60.0, "attempts": 2}
    state, fleet, standing = running("a", **rules)
    pull(state, fleet, standing["a"], 0, now=1.0)
    for now in range(1, 320):
        step(state, e.Tick(float(now)), fleet)
    assert state.run.status == "running"
    step(state, e.Tick(330.0), fleet)
    assert state.run.reason.startswith("no update came for 2 times the deadline of 60 s and the interval of 100 s")
