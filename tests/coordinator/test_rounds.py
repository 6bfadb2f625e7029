"""The round machine, one rule at a time."""

from __future__ import annotations

import pytest

from coordinator import events as e
from coordinator.rounds import resume, step
from edge_runtime.messages import Evaluation
from tests.coordinator import helpers as h


def open_round(plan, *names):
    """A run whose first round is open, its fleet, and the jobs by device."""
    state, fleet = h.start(plan), h.fleet(*names)
    effects = step(state, e.Tick(0.0), fleet)
    return state, fleet, {row.device: row for row in h.jobs(effects)}


def test_happy_path_runs_two_rounds_to_the_end():
    """Jobs, updates, aggregation and verdicts follow one another until the run has ended."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    for round_ in range(2):
        assert sorted(jobs) == ["a", "b"]
        effects = step(state, h.arrived(jobs["b"], number=8), fleet)
        assert [type(effect) for effect in effects] == [e.Save, e.SendDone]
        effects = step(state, h.arrived(jobs["a"], number=9), fleet)
        assert [type(effect) for effect in effects] == [e.Save, e.SendDone, e.Aggregate]
        aggregate = effects[-1]
        assert [row.update.device for row in aggregate.updates] == ["a", "b"]
        assert [row.weight for row in aggregate.updates] == [10.0, 10.0]
        effects = step(state, e.Aggregated(3.0, round_, h.blob(20 + round_), bytes_up=5), fleet)
        assert isinstance(effects[0], e.Save)
        assert [verdict.counted for verdict in h.of(e.SendVerdict, effects)] == [True, True]
        jobs = {row.device: row for row in h.jobs(effects)}
    assert h.one(e.Finished, effects) == e.Finished("finished", "")
    assert state.run.version == 2
    assert state.run.model == h.blob(21)
    assert not state.pending


def test_round_trip_of_one_transaction():
    """Closing a round, its verdicts and the next round's jobs are saved in one transaction."""
    state, fleet, jobs = open_round(h.plan(target=1), "a")
    step(state, h.arrived(jobs["a"]), fleet)
    effects = step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    rows = h.one(e.Save, effects).rows
    kinds = {e.RunRow, e.UpdateRow, e.RoundRow, e.AssignmentRow, e.HistoryRow, e.SelectionRow}
    assert {type(row) for row in rows} == kinds


def test_selection_waits_for_the_target_and_then_takes_fewer():
    """With fewer than the target a round starts only after a tenth of the deadline, and not below the minimum."""
    state, fleet = h.start(h.plan(target=3, minimum=2)), h.fleet("a")
    assert step(state, e.Tick(0.0), fleet) == []
    fleet.announce(1.0, h.device("b"))
    assert h.jobs(step(state, e.DeviceJoined(1.0, "b"), fleet)) == []
    assert h.jobs(step(state, e.Tick(10.9), fleet)) == []
    assert len(h.jobs(step(state, e.Tick(11.0), fleet))) == 2
    fleet.announce(12.0, h.device("c"))
    assert [row.device for row in h.jobs(step(state, e.DeviceJoined(12.0, "c"), fleet))] == ["c"]


def test_patience_is_paid_once_per_shortage():
    """A fleet that stays too small does not delay every round."""
    state, fleet = h.start(h.plan(target=2)), h.fleet("a")
    step(state, e.Tick(0.0), fleet)
    (job,) = h.jobs(step(state, e.Tick(10.0), fleet))
    assert h.of(e.Aggregate, step(state, h.arrived(job, 12.0), fleet))
    assert len(h.jobs(step(state, e.Aggregated(13.0, 0, h.blob(20)), fleet))) == 1


def test_over_commitment_asks_more_and_keeps_the_late_update():
    """The round closes at the target; the update beyond it counts in the next round with a smaller weight."""
    plan = h.plan(target=2, over_commit=1.5, staleness_exponent=1.0, rounds=3)
    state, fleet, jobs = open_round(plan, "a", "b", "c")
    assert len(jobs) == 3
    step(state, h.arrived(jobs["a"]), fleet)
    step(state, h.arrived(jobs["b"]), fleet)
    effects = step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    again = {row.device: row for row in h.jobs(effects)}
    assert sorted(again) == ["a", "b"]
    assert not h.jobs(step(state, h.arrived(jobs["c"], 4.0), fleet))  # it starts nothing before the verdict
    step(state, h.arrived(again["a"], 5.0), fleet)
    aggregate = h.one(e.Aggregate, step(state, h.arrived(again["b"], 5.0), fleet))
    assert {row.update.device: row.weight for row in aggregate.updates} == {"a": 10.0, "b": 10.0, "c": 5.0}
    effects = step(state, e.Aggregated(6.0, 1, h.blob(21)), fleet)
    record = next(row for row in h.one(e.Save, effects).rows if isinstance(row, e.RoundRow))
    assert (record.updates, record.late_updates, record.samples) == (3, 1, 30)
    assert sorted(row.device for row in h.jobs(effects)) == ["a", "b", "c"]


def test_late_updates_alone_make_a_round():
    """Devices whose updates wait for a verdict are not asked again before; the round goes on with what came."""
    state, fleet, jobs = open_round(h.plan(target=3, minimum=1, rounds=3), "a", "b", "c")
    step(state, h.arrived(jobs["a"]), fleet)
    step(state, e.Tick(100.0), fleet)
    effects = [*step(state, h.arrived(jobs["b"], 101.0), fleet), *step(state, h.arrived(jobs["c"], 101.0), fleet)]
    assert not h.jobs(effects)
    effects = step(state, e.Aggregated(102.0, 0, h.blob(20)), fleet)
    (job,) = h.jobs(effects)
    assert job.device == "a"
    aggregate = h.one(e.Aggregate, step(state, h.arrived(job, 103.0), fleet))
    assert [row.update.device for row in aggregate.updates] == ["a", "b", "c"]
    jobs = {row.device: row for row in h.jobs(step(state, e.Aggregated(104.0, 1, h.blob(21)), fleet))}
    assert sorted(jobs) == ["a", "b", "c"]
    step(state, e.Tick(104.0), fleet)
    for device in "abc":
        step(state, h.arrived(jobs[device], 105.0), fleet)
    assert h.one(e.Finished, step(state, e.Aggregated(106.0, 2, h.blob(22)), fleet)).status == "finished"


def test_a_round_of_late_updates_only_waits_for_nobody():
    """Where all that is there came too late for its round, the next one is made of that after the usual wait."""
    state, fleet, jobs = open_round(h.plan(target=2, minimum=1, rounds=3), "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    step(state, e.Tick(100.0), fleet)
    fleet.announce(101.0, h.device("a", online=False))
    step(state, h.arrived(jobs["b"], 101.0), fleet)
    step(state, e.Aggregated(102.0, 0, h.blob(20)), fleet)
    assert not h.of(e.Aggregate, step(state, e.Tick(111.9), fleet))
    step(state, e.Tick(112.0), fleet)
    aggregate = h.one(e.Aggregate, step(state, e.Tick(113.0), fleet))
    assert [row.update.device for row in aggregate.updates] == ["b"]


def test_deadline_closes_with_the_minimum():
    """At the deadline the updates that are there make the round."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    assert step(state, e.Tick(99.0), fleet) == []
    assert len(h.one(e.Aggregate, step(state, e.Tick(100.0), fleet)).updates) == 1


def test_deadline_without_updates_asks_again_and_then_fails():
    """Jobs still open are repeated each attempt; after the last one the run fails with a reason."""
    state, fleet, jobs = open_round(h.plan(attempts=3), "a", "b")
    for attempt in (1, 2):
        again = h.jobs(step(state, e.Tick(100.0 * attempt), fleet))
        assert {row.device: row for row in again} == jobs
    effects = step(state, e.Tick(300.0), fleet)
    finished = h.one(e.Finished, effects)
    assert finished.status == "failed"
    assert "round 1 had 0 of at least 1 update after 3 attempts of 100 s, 2 devices never" in finished.reason
    assert len(h.of(e.SendCancel, effects)) == 2


def test_lost_jobs_are_repeated_while_a_round_waits_for_devices():
    """A device that is busy only because its job message was lost does not hold up the run for ever."""
    state, fleet, jobs = open_round(h.plan(target=1, over_commit=2.0, rounds=3), "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    fleet.announce(2.0, h.device("a", online=False))
    assert not h.jobs(step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet))
    assert h.jobs(step(state, e.Tick(100.0), fleet)) == [jobs["b"]]
    assert not h.jobs(step(state, e.Tick(101.0), fleet))


def test_failed_job_frees_its_place_for_another_device():
    """A replacement is asked at once; the device that failed is not asked again in this attempt."""
    state, fleet, jobs = open_round(h.plan(target=1), "a", "b", "c")
    (first,) = jobs.values()
    replacement = h.jobs(step(state, e.JobReported(1.0, first.device, first.assignment, "too hot"), fleet))
    assert len(replacement) == 1
    assert replacement[0].device != first.device
    last = h.jobs(step(state, e.JobReported(1.0, replacement[0].device, replacement[0].assignment, "x"), fleet))
    step(state, e.JobReported(2.0, last[0].device, last[0].assignment, "x"), fleet)
    assert state.run.deadline_unix_s == 12.0  # nobody left: the next attempt comes soon, but not at once
    assert len(h.jobs(step(state, e.Tick(12.0), fleet))) == 1


def test_round_closes_when_all_have_answered():
    """Nobody waits for a deadline when the rest has failed and nobody else can be asked."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    assert h.of(e.Aggregate, step(state, e.JobReported(2.0, "b", jobs["b"].assignment, "no"), fleet))


def test_update_while_aggregating_waits_for_the_next_round():
    """It is acknowledged at once and enters the next aggregate as a late one."""
    plan = h.plan(target=1, over_commit=2.0, staleness_exponent=1.0)
    state, fleet, jobs = open_round(plan, "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    effects = step(state, h.arrived(jobs["b"]), fleet)
    assert [type(effect) for effect in effects] == [e.Save, e.SendDone]
    effects = step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    job = h.jobs(effects)[0]
    aggregate = h.one(e.Aggregate, step(state, h.arrived(job), fleet))
    assert sorted(row.weight for row in aggregate.updates) == [5.0, 10.0]


def test_update_while_the_last_round_is_aggregated_is_refused():
    """The run has no further round that could take it."""
    state, fleet, jobs = open_round(h.plan(rounds=1, target=1, over_commit=2.0), "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    verdict = h.one(e.SendVerdict, step(state, h.arrived(jobs["b"]), fleet))
    assert not verdict.counted
    assert verdict.reason.startswith("run has ended")


def test_stale_update_is_refused_and_its_job_cancelled():
    """Beyond ``max_staleness`` versions an assignment is cancelled and its update refused."""
    plan = h.plan(rounds=4, target=1, over_commit=2.0, max_staleness=1)
    state, fleet, jobs = open_round(plan, "a", "b")
    job, cancels = jobs["a"], []
    for round_ in range(2):
        step(state, h.arrived(job), fleet)
        effects = step(state, e.Aggregated(3.0, round_, h.blob(20 + round_)), fleet)
        job = next(row for row in h.jobs(effects) if row.device == "a")
        cancels += h.of(e.SendCancel, effects)
    assert [cancel.assignment for cancel in cancels] == [jobs["b"].assignment]
    offer = e.UpdateOffered(9.0, h.update_id(jobs["b"]), h.blob(9), h.meta(jobs["b"]))
    effects = step(state, offer, fleet)
    assert "stale" in h.one(e.SendVerdict, effects).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"samples": 0}, "trained on 0 samples"), ({"model_version": 3}, "from model version 3")],
)
def test_unusable_updates_are_refused_with_a_reason(changes, reason):
    """No samples, or another base model than the assignment's: stored, refused, and the place is free."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    row = jobs["a"]
    offer = e.UpdateOffered(1.0, h.update_id(row), h.blob(9), h.meta(row, **changes))
    effects = step(state, offer, fleet)
    assert reason in h.one(e.SendVerdict, effects).reason
    assert [type(stored) for stored in h.one(e.Save, effects).rows][:3] == [e.UpdateRow, e.LedgerRow, e.AssignmentRow]
    assert h.one(e.SendVerdict, step(state, offer, fleet)) == h.one(e.SendVerdict, effects)


def test_duplicates_get_the_same_answer():
    """Done while pending, the verdict afterwards; other bytes under the same id change nothing."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    first = h.arrived(jobs["a"])
    step(state, first, fleet)
    offer = e.UpdateOffered(2.0, first.update, h.blob(99), first.meta)
    assert step(state, first, fleet) == step(state, offer, fleet) == [e.SendDone(first.update)]
    step(state, h.arrived(jobs["b"]), fleet)
    step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    assert step(state, offer, fleet) == [e.SendVerdict(first.update, counted=True)]


def test_one_assignment_counts_once():
    """A second sequence number of the same assignment is refused."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    step(state, h.arrived(jobs["a"]), fleet)
    verdict = h.one(e.SendVerdict, step(state, h.arrived(jobs["a"], sequence=1), fleet))
    assert "already delivered" in verdict.reason


def test_strangers_are_refused():
    """An update for another device's assignment is refused, one for an unknown assignment answered from the store."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    stolen = e.UpdateArrived(1.0, e.UpdateId("run", "c", jobs["a"].assignment, 0), h.blob(9), h.meta(jobs["a"]))
    effects = step(state, stolen, fleet)
    assert "another device" in h.one(e.SendVerdict, effects).reason
    assert len(effects) == 1
    unknown = e.UpdateOffered(1.0, e.UpdateId("run", "a", "r9-99", 0), h.blob(9), h.meta(jobs["a"]))
    assert step(state, unknown, fleet) == [e.AnswerFromStore(unknown.update, ends=True)]


def test_damaged_update_is_refused_and_replaced():
    """An update that cannot be used frees its place like a failed job."""
    state, fleet, jobs = open_round(h.plan(target=1), "a", "b")
    (row,) = jobs.values()
    effects = step(state, e.UpdateDamaged(1.0, h.update_id(row), h.blob(9), h.meta(row), "holds NaN"), fleet)
    assert h.one(e.SendVerdict, effects).reason == "holds NaN"
    assert len(h.jobs(effects)) == 1


def test_device_that_joins_again_hears_everything_again():
    """Open jobs, acknowledgements and verdicts are repeated for a device that may have lost them."""
    state, fleet, jobs = open_round(h.plan(), "a", "b")
    assert step(state, e.DeviceJoined(1.0, "a"), fleet) == [e.SendJob(jobs["a"])]
    update = h.arrived(jobs["a"])
    step(state, update, fleet)
    assert step(state, e.DeviceJoined(2.0, "a"), fleet) == [e.SendDone(update.update)]
    step(state, h.arrived(jobs["b"]), fleet)
    step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    again = step(state, e.DeviceJoined(4.0, "a"), fleet)
    assert [type(effect) for effect in again] == [e.SendVerdict, e.SendJob]


def test_resume_repeats_all_that_is_still_due():
    """After a restart: acknowledgements, verdicts, jobs, cancellations, the aggregation and evaluations."""
    plan = h.plan(rounds=3, target=1, over_commit=3.0, max_staleness=0, test_set="t.npz")
    state, fleet, jobs = open_round(plan, "a", "b", "c")
    assert h.jobs(resume(state)) == list(jobs.values())
    first = h.arrived(jobs["a"])
    step(state, first, fleet)
    due = resume(state)
    assert h.of(e.SendDone, due) == [e.SendDone(first.update)]
    assert h.one(e.Aggregate, due).updates[0].update == first.update
    assert [row.device for row in h.jobs(due)] == [name for name in jobs if name != "a"]
    step(state, e.Aggregated(3.0, 0, h.blob(20)), fleet)
    due = resume(state)
    assert h.of(e.SendVerdict, due) == [e.SendVerdict(first.update, counted=True)]
    assert {cancel.device for cancel in h.of(e.SendCancel, due)} == {"b", "c"}
    assert [effect.version for effect in h.of(e.Evaluate, due)] == [0, 1]
    assert all(row.version == 1 for row in h.jobs(due))
    step(state, e.StopRequested(4.0), fleet)
    assert h.one(e.Finished, resume(state)).status == "stopped"


@pytest.mark.parametrize("phase", ["selecting", "open", "aggregating"])
def test_stop_ends_a_run_in_any_phase(phase):
    """Pending updates are refused, open jobs cancelled, and a result that comes afterwards changes nothing."""
    state, fleet = h.start(h.plan(over_commit=1.5)), h.fleet("a", "b", "c")
    if phase != "selecting":
        jobs = h.jobs(step(state, e.Tick(0.0), fleet))
        step(state, h.arrived(jobs[0]), fleet)
        if phase == "aggregating":
            step(state, h.arrived(jobs[1]), fleet)
    assert state.run.phase == phase
    effects = step(state, e.StopRequested(5.0), fleet)
    assert isinstance(effects[0], e.Save)
    assert h.one(e.Finished, effects) == e.Finished("stopped", "stopped by the user")
    assert not any(verdict.counted for verdict in h.of(e.SendVerdict, effects))
    assert not state.pending
    assert not state.busy
    assert step(state, e.Aggregated(6.0, 0, h.blob(20)), fleet) == []


def test_evaluations_are_asked_for_and_awaited():
    """The initial version, every n-th and the last are evaluated; the run finishes after the last result."""
    state, fleet = h.start(h.plan(rounds=3, target=1, test_set="t.npz", evaluate_every=2)), h.fleet("a")
    assert h.one(e.Evaluate, resume(state)).version == 0
    result = Evaluation(samples=10, loss_sum=5.0, correct=5)
    jobs, asked = h.jobs(step(state, e.Evaluated(0.0, 0, result), fleet)), []
    assert state.run.initial_test == result
    for round_ in range(3):
        step(state, h.arrived(jobs[0]), fleet)
        effects = step(state, e.Aggregated(3.0, round_, h.blob(20 + round_)), fleet)
        jobs = h.jobs(effects)
        asked += [effect.version for effect in h.of(e.Evaluate, effects)]
    assert asked == [2, 3]
    assert not h.of(e.Finished, effects)
    assert [effect.version for effect in resume(state) if isinstance(effect, e.Evaluate)] == [2, 3]
    assert not h.of(e.Finished, step(state, e.Evaluated(4.0, 3, result), fleet))
    effects = step(state, e.Evaluated(4.0, 2, result), fleet)
    assert h.one(e.Finished, effects).status == "finished"


def test_work_that_fails_ends_the_run():
    """An aggregation or evaluation that cannot be done is a failed run with its reason, not a silent stop."""
    state, fleet, _ = open_round(h.plan(), "a", "b")
    assert h.one(e.Finished, step(state, e.WorkFailed(1.0, "disk full"), fleet)) == e.Finished("failed", "disk full")


def test_losses_and_device_evaluations_are_combined_by_samples():
    """The round's record holds the sample-weighted loss and exact sums over the devices' hold-outs."""
    state, fleet, jobs = open_round(h.plan(rounds=1), "a", "b")
    evaluation = Evaluation(samples=4, loss_sum=2.0, correct=3)
    step(state, h.arrived(jobs["a"], samples=30, loss=1.0, evaluation=evaluation), fleet)
    step(state, h.arrived(jobs["b"], samples=10, loss=3.0, evaluation=evaluation), fleet)
    effects = step(state, e.Aggregated(3.0, 0, h.blob(20), bytes_up=7, bytes_down=9), fleet)
    record = next(row for row in h.one(e.Save, effects).rows if isinstance(row, e.RoundRow))
    assert record.train_loss == 1.5
    assert record.devices == Evaluation(samples=8, loss_sum=4.0, correct=6)
    assert (record.bytes_up, record.bytes_down) == (7, 9)


def test_the_place_of_a_device_that_left_is_given_on_at_once():
    """Another device is asked without waiting for the deadline; the update of the one that left still counts."""
    state, fleet, jobs = open_round(h.plan(target=2, deadline_s=100.0), "a", "b", "c", "d")
    gone, stays = sorted(jobs)
    fleet.announce(1.0, h.device(gone, online=False))
    effects = step(state, e.DeviceLeft(1.0, gone), fleet)
    (other,) = h.jobs(effects)
    assert other.device not in jobs
    assert [row.away for row in h.one(e.Save, effects).rows if isinstance(row, e.AssignmentRow)] == [True, False]
    assert step(state, e.DeviceLeft(2.0, gone), fleet) == []
    fleet.announce(3.0, h.device(gone, session="s2"))
    effects = step(state, e.DeviceJoined(3.0, gone), fleet)
    assert h.jobs(effects) == [jobs[gone]]
    assert [row.away for row in h.one(e.Save, effects).rows] == [False]
    step(state, h.arrived(jobs[gone], 4.0), fleet)
    aggregate = h.one(e.Aggregate, step(state, h.arrived(other, 5.0), fleet))
    assert sorted(row.update.device for row in aggregate.updates) == sorted([gone, other.device])
    assert state.assignments[jobs[stays].assignment].status == "open"


def test_places_that_many_devices_leave_are_given_on_together():
    """In a large fleet a whole site may leave at once: one selection gives all its places on, not one for each."""
    names = [f"d{number:04d}" for number in range(1200)]
    state, fleet, jobs = open_round(h.plan(target=100, deadline_s=100.0), *names)
    asked = []
    for number, name in enumerate(sorted(jobs)[:50]):
        fleet.announce(1.0, h.device(name, online=False))
        asked.append(len(h.jobs(step(state, e.DeviceLeft(1.0 + number / 1000, name), fleet))))
    assert asked == [1] + 49 * [0]
    assert len(h.jobs(step(state, e.Tick(2.0), fleet))) == 49
    assert state.run.next_selection == 3


def test_without_a_replacement_the_round_waits_for_the_device_that_left():
    """Leaving is no failure: its update closes the round when it comes."""
    state, fleet, jobs = open_round(h.plan(target=2, minimum=1), "a", "b")
    fleet.announce(1.0, h.device("a", online=False))
    assert h.jobs(step(state, e.DeviceLeft(1.0, "a"), fleet)) == []
    assert not h.of(e.Aggregate, step(state, h.arrived(jobs["b"], 2.0), fleet))
    assert h.of(e.Aggregate, step(state, h.arrived(jobs["a"], 50.0), fleet))


def test_reasons_count_from_one_and_know_the_singular():
    """What a person reads says "round 1", "1 attempt", "1 device", as status does."""
    state, fleet, _ = open_round(h.plan(target=1, attempts=1), "a")
    finished = h.one(e.Finished, step(state, e.Tick(100.0), fleet))
    assert finished.reason == "round 1 had 0 of at least 1 update after 1 attempt of 100 s, 1 device never answered"
