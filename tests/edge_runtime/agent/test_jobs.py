"""The agent's job machine: one rule at a time, then anything in any order."""

from __future__ import annotations

import math
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent import jobs as j
from edge_runtime.agent.limits import Decline
from edge_runtime.messages import BlobRef, EnergyUse, Job, ModelRef, UpdateId, UpdateMeta
from edge_runtime.store.spool import RunChange, SpooledUpdate

CAN = j.Capabilities(
    datasets=frozenset({"digits"}), codecs=frozenset({"raw"}), methods=frozenset({"fedavg"}), blob_limit_bytes=1000
)
META = UpdateMeta(round=0, model_version=0, samples=1, steps=1)


def blob(name: str, size: int = 10) -> BlobRef:
    return BlobRef(sha256=name.encode().hex().ljust(64, "0"), size_bytes=size)


def job(name: str = "a1", bundle: str = "b", model: str = "m", **fields) -> Job:
    values = {
        "run": "run",
        "round": 0,
        "model_version": 0,
        "dataset": "digits",
        "deadline_s": 100.0,
        "epochs": 1,
    } | fields
    return Job(assignment=name, bundle=blob(bundle), model=ModelRef(blobs=[blob(model)]), **values)


def chained(name: str = "a1", *changes: str, base: int = 3, inline: bytes = b"", **fields) -> Job:
    """A job whose model is made of a held version and changes."""
    model = ModelRef(base=base, blobs=[blob(change) for change in changes], vector_sha256="f" * 64)
    return msgspec.structs.replace(job(name, **fields), model=model, inline=inline)


def update(name: str = "a1", run: str = "run") -> UpdateId:
    return UpdateId(run, "dev", name, 0)


def spooled(name: str = "a1", run: str = "run", key: str = "k") -> SpooledUpdate:
    return SpooledUpdate(update=update(name, run), file="file", blob=blob("u"), meta=META, key=key)


CHANGE = RunChange("state")


def fresh() -> j.AgentState:
    return j.AgentState("dev", CAN)


def arrive(state, wanted=None, *, now=0.0, known=None, crashes=0, held=True):
    return j.step(state, j.JobArrived(now, wanted or job(), known, crashes, held))


def ready(state, *names, now=0.0):
    return [effect for name in names for effect in j.step(state, j.BlobReady(now, blob(name).sha256))]


def running(state, wanted=None, crashes=0):
    """A state that trains one job."""
    wanted = wanted or job()
    arrive(state, wanted, crashes=crashes)
    effects = [
        *j.step(state, j.BlobReady(0.0, wanted.bundle.sha256)),
        *j.step(state, j.BlobReady(0.0, wanted.model.blobs[0].sha256)),
    ]
    assert effects == [j.StartTraining(wanted)]
    return wanted


def trained(state, now=1.0):
    return j.step(state, j.Trained(now, "file", blob("u"), META, "k", CHANGE))


def counted(state, name="a1", now=1.0):
    return j.step(state, j.VerdictArrived(now, update(name), True, ""))


def starts(effects):
    return [effect.job.assignment for effect in effects if isinstance(effect, j.StartTraining)]


def reports(effects):
    return [(effect.status.assignment, effect.status.status) for effect in effects if isinstance(effect, j.Report)]


def test_job_is_fetched_trained_and_offered():
    """A job fetches its blobs, trains when both are there, and its update is spooled, with what it changes of its run,
    before it is offered."""
    state = fresh()
    assert arrive(state) == [j.FetchBlob(blob("b")), j.FetchBlob(blob("m"))]
    assert ready(state, "b") == []
    assert ready(state, "m") == [j.StartTraining(job())]
    assert trained(state) == [j.SpoolUpdate(spooled(), CHANGE), j.Offer(update(), push=True)]
    assert (state.running, state.jobs) == (None, {})


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (job(dataset="faces"), "dataset 'faces' is not on this device"),
        (job(codec="magic"), "codec 'magic'"),
        (job(method="fedfoo"), "method 'fedfoo'"),
        (msgspec.structs.replace(job(), model=ModelRef(blobs=[blob("m", 1001)])), "limit of 1000"),
        (msgspec.structs.replace(job(), model=ModelRef(base=1, blobs=[blob("m", 1001)])), "limit of 1000"),
        (msgspec.structs.replace(job(), model=ModelRef()), "names 0 blobs for a whole model"),
        (msgspec.structs.replace(job(), model=ModelRef(blobs=[blob("m"), blob("n")])), "names 2 blobs"),
        (msgspec.structs.replace(job(), model=ModelRef(base=1)), "does not say which hash must come out"),
        (job(deadline_s=math.nan), "no duration"),
        (job(deadline_s=math.inf), "no duration"),
    ],
)
def test_unfit_job_is_rejected_with_the_reason(wanted, said):
    """A job that needs what this device did not announce is rejected at once, and nothing is fetched."""
    state = fresh()
    (effect,) = arrive(state, wanted)
    assert effect.status.status == "rejected"
    assert said in effect.status.reason
    assert state.jobs == {}


def test_repeated_job_is_not_done_twice():
    """A job that is being worked on goes on; one with a waiting update is answered with its offer."""
    state = fresh()
    running(state)
    assert arrive(state) == []
    trained(state)
    assert arrive(state, known="ready") == [j.Offer(update(), push=False)]
    assert arrive(state, known="delivered") == [j.Offer(update(), push=False)]


@pytest.mark.parametrize("known", ["counted", "refused"])
def test_job_with_a_verdict_is_not_done_again(known):
    """A job whose update got its verdict is over, and a coordinator that forgot it is told so."""
    state = fresh()
    (effect,) = arrive(state, known=known)
    assert effect.status.status == "rejected"
    assert f"already {known}" in effect.status.reason
    assert "submit the plan under another name" in effect.status.reason
    assert state.jobs == {}


def test_paused_device_rejects_jobs_with_the_reason():
    """A job that arrives while training is paused goes back at once, so that another device can have it."""
    state = fresh()
    j.step(state, j.Paused(0.0, "81 degrees C"))
    (effect,) = arrive(state)
    assert effect.status.status == "rejected"
    assert "paused here: 81 degrees C" in effect.status.reason
    j.step(state, j.Paused(1.0, ""))
    assert reports(arrive(state)) == []
    assert len(state.jobs) == 1


def test_jobs_that_a_pause_keeps_waiting_are_declined_after_a_minute():
    """Waiting jobs stay for a minute, a pause may be short; then they go back with the reason of now, as declined."""
    state = fresh()
    arrive(state, now=0.0)
    j.step(state, j.Paused(10.0, "hot"))
    j.step(state, j.Paused(60.0, "hotter", for_s=120.0))
    assert reports(j.step(state, j.Tick(69.0))) == []
    effects = j.step(state, j.Tick(70.0))
    assert reports(effects) == [("a1", "rejected")]
    assert "paused here: hotter" in effects[-1].status.reason
    assert effects[-1].status.declined_s == 120.0
    assert state.jobs == {}


def test_job_that_cannot_be_afforded_is_declined():
    """What the daemon found too dear goes back with its reason and for how long; what is here already is offered."""
    state = fresh()
    too_dear = Decline("the battery would be empty", 900.0)
    (effect,) = j.step(state, j.JobArrived(0.0, job(), None, 0, True, too_dear))
    said = effect.status
    assert (said.status, said.reason, said.declined_s) == ("rejected", "the battery would be empty", 900.0)
    assert state.jobs == {}
    assert j.step(state, j.JobArrived(0.0, job(), "ready", 0, True, too_dear)) == [j.Offer(update(), push=False)]
    (effect,) = j.step(state, j.JobArrived(0.0, job(dataset="faces"), None, 0, True, too_dear))
    assert effect.status.declined_s is None  # it could never be done here


def test_updates_of_one_assignment_have_numbers():
    """Jobs of a standing assignment follow each other under one name; each makes the update with its own number."""
    state = fresh()
    for number in (4, 5):
        running(state, job(sequence=number))
        (spool, *_) = trained(state)
        assert spool.update.update == UpdateId("run", "dev", "a1", number)
        j.step(state, j.VerdictArrived(1.0, spool.update.update, True, ""))


def test_a_newer_number_takes_the_place_of_a_waiting_one():
    """Of one standing assignment at most one job waits; the running one is left alone."""
    state = fresh()
    arrive(state, job(sequence=1))
    effects = arrive(state, job(model="n", sequence=2))
    assert j.StopFetch(blob("m").sha256) in effects
    assert [entry.job.sequence for entry in state.jobs.values()] == [2]
    ready(state, "b", "n")
    assert arrive(state, job(model="n", sequence=3)) == []
    assert [entry.job.sequence for entry in state.jobs.values()] == [2]


def test_lifted_quarantine_starts_counting_anew():
    """When the disk no longer knows of crashes, those in memory do not bring the quarantine back after one more."""
    state = fresh()
    state.crashes[blob("b").sha256] = 3
    running(state)
    j.step(state, j.WorkerCrashed(1.0, "crash", False))
    assert state.crashes[blob("b").sha256] == 1


def test_update_that_waits_for_room_on_the_disk_is_not_trained_again():
    """While a full disk keeps a finished update out of the spool, its repeated job trains nothing."""
    state = fresh()
    running(state)
    trained(state)
    assert arrive(state, known=None) == [j.Offer(update(), push=False)]


def test_one_job_trains_at_a_time_by_priority_then_age():
    """Of the jobs whose blobs are there the most urgent starts, then the oldest."""
    state = fresh()
    running(state)
    for name, priority in (("low", 0), ("first", 5), ("second", 5)):
        arrive(state, job(name, priority=priority))
    assert ready(state, "b", "m") == []
    started, name = [], "a1"
    for _ in range(3):
        trained(state)
        (name,) = starts(counted(state, name))
        started.append(name)
    assert started == ["first", "second", "low"]


def test_a_run_has_one_update_without_a_verdict():
    """A job waits until the update before it is settled, whatever the verdict; jobs of other runs and evaluations do
    not wait, nor does anything wait for an evaluation."""
    state = fresh()
    running(state)
    for wanted in (job("a2"), job("b1", run="other"), job("e1", epochs=None)):
        arrive(state, wanted)
    ready(state, "b", "m")
    assert starts(trained(state)) == ["b1"]
    assert starts(trained(state)) == ["e1"]
    assert starts(j.step(state, j.Trained(2.0, "empty", blob("e", 0), META))) == []
    assert state.unsettled("run") == [update("a1")]
    j.step(state, j.DoneArrived(update("a1")))
    assert starts(j.step(state, j.Tick(3.0))) == []
    effects = j.step(state, j.VerdictArrived(4.0, update("a1"), False, "too old"))
    assert effects[0] == j.CloseUpdate(update("a1"), "refused", "too old")  # on disk before the next job looks
    assert effects[1:] == [j.StartTraining(job("a2"))]


def test_an_update_from_before_a_restart_is_waited_for_too():
    """What the spool holds counts like what was trained since."""
    state = j.AgentState.restore("dev", CAN, [spooled("a1")])
    arrive(state, job("a2"))
    assert starts(ready(state, "b", "m")) == []
    assert starts(counted(state)) == ["a2"]
    evaluated = SpooledUpdate(update=update("e1"), file="empty", blob=blob("e", 0), meta=META, state="delivered")
    state = j.AgentState.restore("dev", CAN, [evaluated])
    arrive(state, job("a2"))
    assert starts(ready(state, "b", "m")) == ["a2"]


def test_a_job_that_waits_for_a_verdict_asks_for_it_and_expires():
    """The verdict may have been lost on its way: whenever such a job comes, the update is offered again, which the
    coordinator answers. If none comes, the job fails at its deadline with that reason."""
    state = fresh()
    running(state)
    trained(state)
    effects = arrive(state, job("a2"))
    assert effects[0] == j.Offer(update("a1"), push=False)
    ready(state, "b", "m")
    assert arrive(state, job("a2"), now=10.0) == [j.Offer(update("a1"), push=False)]
    assert j.Offer(update("a1"), push=False) not in arrive(state, job("e1", epochs=None))
    assert starts(ready(state, "b", "m")) == ["e1"]
    (report,) = j.step(state, j.Tick(110.0))
    assert (report.status.assignment, report.status.status) == ("a2", "failed")
    assert "an earlier update of this run still waits for its verdict" in report.status.reason


def test_job_that_builds_on_a_model_that_is_not_here_is_rejected():
    """The coordinator is told which version is missing, so that it sends the whole model."""
    state = fresh()
    (effect,) = arrive(state, chained("a1", "c4", "c5"), held=False)
    assert effect.status.status == "rejected"
    assert "builds on model version 3 of run 'run', which this device does not hold" in effect.status.reason
    assert state.jobs == {}


def test_job_whose_base_is_gone_when_it_starts_is_rejected_like_one_that_comes():
    """What it builds on may be pruned while it waits for a verdict; the next job is not held up by it."""
    state = fresh()
    running(state)
    wanted = chained("a2", "c4")
    arrive(state, wanted)
    trained(state)
    ready(state, "b", "c4")
    assert starts(counted(state)) == ["a2"]
    arrive(state, job("a3"))
    ready(state, "b", "m")
    rejected, start = j.step(state, j.ModelLost(2.0))
    assert rejected == arrive(fresh(), wanted, held=False)[0]
    assert starts([start]) == ["a3"]
    trained(state)
    assert j.step(state, j.ModelLost(3.0)) == []


def test_changes_are_fetched_and_the_last_one_may_be_in_the_job():
    """All blobs of a chain are fetched; bytes that the job brought belong to the last, and are not kept in memory."""
    state = fresh()
    wanted = chained("a1", "c4", "c5", inline=b"bytes")
    assert arrive(state, wanted) == [
        j.FetchBlob(blob("b")),
        j.FetchBlob(blob("c4")),
        j.FetchBlob(blob("c5"), b"bytes"),
    ]
    assert ready(state, "b", "c5") == []
    (start,) = ready(state, "c4")
    assert start.job == msgspec.structs.replace(wanted, inline=b"")


def test_job_on_the_very_version_that_is_held_needs_no_model():
    """An empty chain brings nothing, and bytes without a blob are ignored."""
    state = fresh()
    assert arrive(state, chained("a1", inline=b"stray")) == [j.FetchBlob(blob("b"))]
    assert starts(ready(state, "b")) == ["a1"]


def test_repeated_job_may_choose_another_way_to_the_model():
    """A coordinator that forgot what is held sends a snapshot: what is no longer needed is not fetched, what is here
    is not fetched again, and a way that cannot be gone is ignored."""
    state = fresh()
    arrive(state, chained("a1", "c4", "c5"))
    ready(state, "b")
    snapshot = msgspec.structs.replace(job("a1"), model=ModelRef(blobs=[blob("snap")], vector_sha256="f" * 64))
    effects = arrive(state, snapshot)
    assert effects == [j.StopFetch(blob("c4").sha256), j.StopFetch(blob("c5").sha256), j.FetchBlob(blob("snap"))]
    assert arrive(state, chained("a1", "c9", base=8), held=False) == []
    assert ready(state, "snap") == [j.StartTraining(snapshot)]
    state = fresh()
    arrive(state, chained("a1", "c4"))
    ready(state, "b")
    assert starts(arrive(state, chained("a1", base=4))) == ["a1"]  # by now it is held itself


def test_done_and_verdict_close_an_update_once():
    """Done is noted, a verdict closes; repeating either, or in the other order, changes nothing more."""
    state = fresh()
    running(state)
    trained(state)
    assert j.step(state, j.DoneArrived(update())) == [j.CloseUpdate(update(), "delivered", "")]
    assert j.step(state, j.DoneArrived(update())) == []
    assert j.step(state, j.VerdictArrived(1.0, update(), True, "")) == [j.CloseUpdate(update(), "counted", "")]
    assert j.step(state, j.VerdictArrived(1.0, update(), False, "late")) == []
    assert j.step(state, j.DoneArrived(update())) == []
    assert j.step(state, j.Connected()) == []


def test_reconnect_offers_every_open_update():
    """After every connection each update without a verdict is offered, also one that was delivered."""
    state = j.AgentState(
        "dev", CAN, updates={update("a"): j.OpenUpdate("ready"), update("b"): j.OpenUpdate("delivered")}
    )
    assert j.step(state, j.Connected()) == [j.Offer(update("a"), push=False), j.Offer(update("b"), push=False)]


def test_failed_training_is_reported_and_the_next_job_starts():
    """A job that cannot be done is reported with its reason and does not block the next."""
    state = fresh()
    running(state)
    arrive(state, job("a2"))
    ready(state, "b", "m")
    effects = j.step(state, j.TrainingFailed(1.0, "loss is not finite"))
    assert reports(effects) == [("a1", "failed")]
    assert effects[0].status.reason == "loss is not finite"
    assert effects[1:] == [j.StartTraining(job("a2"))]


def test_three_crashes_put_a_bundle_in_quarantine():
    """The third crash in a row fails the queued jobs of the bundle and rejects new ones; other bundles go on."""
    state = fresh()
    for crashes in range(2):
        running(state, crashes=crashes)
        effects = j.step(state, j.WorkerCrashed(1.0, "signal SIGSEGV", False))
        assert effects[0] == j.CountCrash(blob("b").sha256)
    running(state, crashes=2)
    arrive(state, job("queued"), crashes=2)
    ready(state, "b", "m")
    arrive(state, job("other", bundle="c"))
    ready(state, "c", "m")
    effects = j.step(state, j.WorkerCrashed(1.0, "signal SIGSEGV", False))
    assert reports(effects) == [("a1", "failed"), ("queued", "failed")]
    assert "quarantine" in effects[2].status.reason
    assert effects[-1] == j.StartTraining(job("other", bundle="c"))
    (effect,) = arrive(state, job("late"), crashes=3)
    assert effect.status.status == "rejected"


def test_success_forgives_crashes_also_those_before_a_restart():
    """Crashes count in a row: a job that ends well forgets them, those on disk as well."""
    state = fresh()
    wanted = job()
    arrive(state, wanted, crashes=2)
    ready(state, "b", "m")
    assert j.ForgiveCrashes(blob("b").sha256) in trained(state)
    counted(state)
    running(state, job("a2"))
    j.step(state, j.WorkerCrashed(1.0, "crash", False))
    assert state.crashes[blob("b").sha256] == 1


def test_worker_killed_by_the_agent_does_not_count():
    """Heat, a limit or a cancel are no fault of the bundle."""
    state = fresh()
    running(state)
    effects = j.step(state, j.WorkerCrashed(1.0, "battery low", True))
    assert reports(effects) == [("a1", "failed")]
    assert state.crashes == {}
    assert j.step(state, j.WorkerCrashed(1.0, "battery low", True)) == []


def test_cancelled_running_job_stops():
    """A cancel kills the worker of a running job; its end is reported and the next job starts."""
    state = fresh()
    running(state)
    arrive(state, job("a2"))
    ready(state, "b", "m")
    assert j.step(state, j.JobCancelled("run", "a1")) == [j.StopTraining("cancelled by the coordinator")]
    effects = j.step(state, j.WorkerCrashed(1.0, "cancelled by the coordinator", True))
    assert reports(effects) == [("a1", "failed")]
    assert effects[-1] == j.StartTraining(job("a2"))


def test_cancelled_waiting_job_is_forgotten():
    """The coordinator hears that it was; a blob that another job needs is still fetched."""
    state = fresh()
    arrive(state, job("a1", model="m1"))
    arrive(state, job("a2", model="m2"))
    stopped, report = j.step(state, j.JobCancelled("run", "a1"))
    assert stopped == j.StopFetch(blob("m1").sha256)
    assert (report.status.assignment, report.status.reason) == ("a1", "cancelled by the coordinator")
    assert j.step(state, j.JobCancelled("run", "unknown")) == []
    assert list(state.jobs) == [("run", "a2")]


def test_update_finished_while_it_was_being_cancelled_is_kept():
    """A cancel that comes too late loses no work: the update is offered and the coordinator decides."""
    state = fresh()
    running(state)
    j.step(state, j.JobCancelled("run", "a1"))
    assert j.Offer(update(), push=True) in trained(state)


def test_expired_job_is_given_up_unless_it_runs():
    """A job whose deadline passes before it starts fails; a running one goes on, late updates still count."""
    state = fresh()
    running(state)
    arrive(state, job("a2", model="slow"))
    effects = j.step(state, j.Tick(100.0))
    assert reports(effects) == [("a2", "failed")]
    assert j.StopFetch(blob("slow").sha256) in effects
    assert state.running == ("run", "a1")


def test_blob_that_cannot_be_had_fails_its_jobs():
    """Every job that waits for a blob fails with the reason; others stay."""
    state = fresh()
    arrive(state, job("a1", model="bad"))
    arrive(state, job("a2", model="bad"))
    arrive(state, job("a3"))
    effects = j.step(state, j.BlobFailed(1.0, blob("bad").sha256, "no space left"))
    assert reports(effects) == [("a1", "failed"), ("a2", "failed")]
    assert list(state.jobs) == [("run", "a3")]


def test_queue_has_a_limit():
    """A flood of jobs does not fill the device's memory."""
    state = fresh()
    for number in range(j.QUEUE_LIMIT):
        arrive(state, job(f"a{number}"))
    (effect,) = arrive(state, job("one-more"))
    assert "queue of this device is full" in effect.status.reason


def test_paused_device_does_not_train():
    """Heat stops the running job and keeps others from starting until it is over."""
    state = fresh()
    running(state)
    arrive(state, job("a2"))
    assert j.step(state, j.Paused(1.0, "too hot")) == [j.StopTraining("too hot")]
    j.step(state, j.WorkerCrashed(1.0, "too hot", True))
    assert ready(state, "b", "m") == []
    assert j.step(state, j.Paused(2.0, "")) == [j.StartTraining(job("a2"))]


def test_a_limit_ends_training_and_keeps_its_work():
    """A job that has begun to train is asked to end once, however often a limit is met; its update is sent as any."""
    state = fresh()
    running(state)
    assert j.step(state, j.PhaseBegun("train")) == []
    assert j.step(state, j.LimitReached("drew 12 J")) == [j.StopEarly("drew 12 J")]
    assert j.step(state, j.LimitReached("drew 13 J")) == []
    assert j.step(state, j.Paused(1.0, "too hot", True)) == []
    assert trained(state) == [j.SpoolUpdate(spooled(), CHANGE), j.Offer(update(), push=True)]
    assert state.paused == "too hot"


def test_heat_ends_training_early_and_new_jobs_wait():
    """After heat the work is kept, and the next job waits until it is cooler."""
    state = fresh()
    running(state)
    arrive(state, job("b1", run="other"))
    ready(state, "b", "m")
    j.step(state, j.PhaseBegun("train"))
    assert j.step(state, j.Paused(1.0, "too hot", True)) == [j.StopEarly("too hot")]
    assert starts(trained(state)) == []
    assert starts(j.step(state, j.Paused(2.0, ""))) == ["b1"]


def test_a_limit_before_the_first_step_kills_the_worker():
    """While the worker loads and evaluates there is nothing to send: the job fails, and says what it drew."""
    state = fresh()
    running(state)
    assert j.step(state, j.LimitReached("drew 12 J")) == [j.StopTraining("drew 12 J")]
    drew = EnergyUse(radio_mj=5)
    (report,) = j.step(state, j.WorkerCrashed(1.0, "drew 12 J", True, drew))
    assert (report.status.status, report.status.reason, report.status.energy) == ("failed", "drew 12 J", drew)
    assert state.crashes == {}


def test_a_limit_lets_the_encoding_end():
    """What was trained to its end is written and sent, too hot or not."""
    state = fresh()
    running(state)
    j.step(state, j.PhaseBegun("train"))
    j.step(state, j.PhaseBegun("compress"))
    assert j.step(state, j.LimitReached("drew 12 J")) == []
    assert j.step(state, j.Paused(1.0, "too hot", True)) == []
    assert j.Offer(update(), push=True) in trained(state)


def test_want_of_memory_kills_training_that_is_ending_too():
    """To encode takes memory: what was to end early is killed at once when that gets short, and so is what encodes."""
    for phase in ("train", "compress"):
        state = fresh()
        running(state)
        j.step(state, j.PhaseBegun(phase))
        j.step(state, j.Paused(1.0, "too hot", True))
        assert j.step(state, j.Paused(2.0, "no memory")) == [j.StopTraining("no memory")]


def test_training_that_does_not_end_early_fails():
    """A worker that was killed for going on is no fault of the bundle, and the next job starts anew."""
    state = fresh()
    running(state)
    j.step(state, j.PhaseBegun("train"))
    j.step(state, j.LimitReached("drew 12 J"))
    arrive(state, job("a2"))
    ready(state, "b", "m")
    effects = j.step(state, j.WorkerCrashed(1.0, "drew 12 J; the step did not end", True))
    assert reports(effects) == [("a1", "failed")]
    assert starts(effects) == ["a2"]
    assert j.step(state, j.LimitReached("drew 12 J")) == [j.StopTraining("drew 12 J")]  # of the new one, not begun


def test_words_about_a_job_that_is_over_change_nothing():
    """Phase and limit may arrive after the end of their job."""
    state = fresh()
    for event in (j.PhaseBegun("train"), j.LimitReached("drew 12 J")):
        assert j.step(state, event) == []
    assert state == fresh()


def test_a_failed_job_says_what_it_drew():
    """Joules go with the report, also where nothing came of them."""
    state = fresh()
    running(state)
    drew = EnergyUse(train_mj=1200)
    (report,) = j.step(state, j.TrainingFailed(1.0, "loss is NaN", drew))
    assert report.status.energy == drew


class Device:
    """Carries out effects as the daemon does, on a spool that survives restarts, and holds the rules."""

    def __init__(self) -> None:
        self.spool: dict[UpdateId, tuple[str, bool]] = {}  # state, and whether it has bytes
        self.crashes: dict[str, int] = {}
        self.trained: dict[UpdateId, int] = {}
        self.state = fresh()
        self.training: Job | None = None
        self.stopping = self.ending = False
        self.phase: str | None = None
        self.now = 0.0

    def send(self, event) -> list:
        effects = j.step(self.state, event)
        for effect in effects:
            match effect:
                case j.StartTraining(wanted):
                    assert self.training is None, "two jobs at a time"
                    assert not self.state.paused
                    identity = update(wanted.assignment)
                    assert identity not in self.spool, "trained although its update is known"
                    waiting = [name for name, (verdict, bytes_) in self.spool.items() if bytes_ and is_open(verdict)]
                    assert wanted.epochs is None or not waiting, "a second update without a verdict"
                    assert self.crashes.get(wanted.bundle.sha256, 0) < j.CRASH_LIMIT, "trained in quarantine"
                    self.training, self.phase, self.ending = wanted, None, False
                case j.StopTraining():
                    assert self.training is not None
                    self.stopping = True
                case j.StopEarly():
                    assert self.training is not None
                    assert self.phase == "train", "asked to end what has not begun, or is over"
                    assert not self.ending, "asked twice"
                    self.ending = True
                case j.SpoolUpdate(wanted):
                    self.spool[wanted.update] = ("ready", wanted.blob.size_bytes > 0)
                case j.Offer(identity):
                    assert identity in self.spool, "offered before it was durable"
                case j.CloseUpdate(identity, verdict):
                    state, has_bytes = self.spool[identity]
                    assert is_open(state), "closed twice"
                    self.spool[identity] = (verdict, has_bytes)
                case j.CountCrash(bundle):
                    self.crashes[bundle] = self.crashes.get(bundle, 0) + 1
                case j.ForgiveCrashes(bundle):
                    self.crashes.pop(bundle, None)
                case j.Report(status):
                    assert status.reason
        assert (self.training is None) == (self.state.running is None)
        assert sum(entry.running for entry in self.state.jobs.values()) == (self.state.running is not None)
        return effects

    def end(self, event) -> None:
        self.training, self.stopping = None, False
        self.send(event)

    def restart(self) -> None:
        self.training, self.stopping = None, False
        opened = [
            SpooledUpdate(update=name, file="f", blob=blob("u", 10 * has_bytes), meta=META, state=state)
            for name, (state, has_bytes) in self.spool.items()
            if is_open(state)
        ]
        self.state = j.AgentState.restore("dev", CAN, opened)


def is_open(state: str) -> bool:
    return state in ("ready", "delivered")


NAMES = ["a1", "a2", "a3", "a4", "e1"]  # the last one only evaluates
BUNDLES = ["b1", "b2"]


def act(device: Device, random: Random) -> None:  # noqa: PLR0912 - one arm per thing
    """One random thing that can happen to a device."""
    device.now += random.choice([0.0, 0.1, 30.0])
    name = random.choice(NAMES)
    identity = update(name)
    wanted = job(
        name,
        bundle=BUNDLES[NAMES.index(name) % 2],
        model=f"m{random.randrange(2)}",
        priority=random.randrange(3),
        epochs=None if name == "e1" else 1,
    )
    match random.randrange(15):
        case 0 | 1 | 2:
            crashes = device.crashes.get(wanted.bundle.sha256, 0)
            known = device.spool.get(identity, (None, False))[0]
            device.send(j.JobArrived(device.now, wanted, known, crashes, random.random() < 0.9))
        case 3 | 4 | 5:
            device.send(j.BlobReady(device.now, blob(random.choice([*BUNDLES, "m0", "m1"])).sha256))
        case 6:
            device.send(j.BlobFailed(device.now, blob(random.choice(["b1", "m0"])).sha256, "gone"))
        case 7 if device.training is not None:
            size = 0 if device.training.epochs is None else 10
            device.end(j.Trained(device.now, "file", blob("u", size), META))
        case 8 if device.training is not None:
            if device.stopping or random.random() < 0.5:
                device.end(j.WorkerCrashed(device.now, "ended", device.stopping or device.ending))
            else:
                device.end(random.choice([j.TrainingFailed(device.now, "failed"), j.ModelLost(device.now)]))
        case 9:
            device.send(j.DoneArrived(identity))
        case 10:
            device.send(j.VerdictArrived(device.now, identity, random.random() < 0.5, ""))
        case 11:
            device.send(
                random.choice(
                    [
                        j.JobCancelled("run", name),
                        j.Tick(device.now),
                        j.Paused(device.now, random.choice(["", "hot"]), random.random() < 0.5),
                        j.LimitReached("drew too much"),
                    ]
                )
            )
        case 12 if random.random() < 0.3:
            device.restart()
        case 13 | 14 if device.training is not None:
            if device.training.epochs is not None:
                device.phase = {None: "train"}.get(device.phase, "compress")
                device.send(j.PhaseBegun(device.phase))
        case _:
            opened = {key for key, (verdict, _) in device.spool.items() if is_open(verdict)}
            offered = {effect.update for effect in device.send(j.Connected())}
            assert offered == opened, "every finished update is offered until its verdict"


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_order_of_events_keeps_the_rules(seed):
    """Random jobs, blobs, ends, verdicts, pauses and restarts never break a rule, and at the end the queue drains."""
    device, random = Device(), Random(seed)
    for _ in range(80):
        act(device, random)
    device.send(j.Paused(device.now, ""))
    while device.training is not None:
        device.end(j.WorkerCrashed(device.now, "killed", True))
    device.send(j.Tick(device.now + 1e6))
    assert device.state.jobs == {}


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_waiting_for_verdicts_never_stops_a_device(seed):
    """After anything at all, as long as every offer gets its verdict at some time, every job that comes is done."""
    device, random = Device(), Random(seed)
    for _ in range(40):
        act(device, random)
    device.send(j.Paused(device.now, ""))
    device.crashes.clear()
    while device.training is not None:
        device.end(j.WorkerCrashed(device.now, "killed", True))
    device.send(j.Tick(device.now + 1e6))
    names = [f"late{number}" for number in range(3)]
    for name in names:
        device.send(j.JobArrived(device.now, job(name), None, 0))
    for name in ("b", "m"):
        device.send(j.BlobReady(device.now, blob(name).sha256))
    for _ in range(20):
        if device.training is not None:
            device.end(j.Trained(device.now, "file", blob("u"), META))
        for effect in device.send(j.Connected()):
            device.send(j.VerdictArrived(device.now, effect.update, random.random() < 0.5, ""))
    assert all(update(name) in device.spool for name in names)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_same_events_give_the_same_effects(seed):
    """The machine has no hidden input: the same seed replays the same state."""
    states = []
    for _ in range(2):
        device, random = Device(), Random(seed)
        for _ in range(60):
            act(device, random)
        states.append((device.state, device.spool))
    assert states[0] == states[1]
