"""The downlink's chain of changes: which way a device comes to the current model, and what happens if it cannot."""

from __future__ import annotations

import pytest

from coordinator import events as e
from coordinator.chain import REQUEST_BYTES, cheapest_base
from coordinator.job_message import INLINE_BYTES, inline_bytes, make_job
from coordinator.plan import Downlink, Uplink
from coordinator.rounds import resume, step
from coordinator.run_state import RunState
from edge_runtime.messages import BlobRef, ModelRef
from edge_runtime.store.blobs import BlobStore
from tests.coordinator import helpers as h

SNAPSHOT = 100_000


def kept(*sizes, first=1):
    """Changes of these sizes, by the version that they make."""
    return dict(enumerate(sizes, first))


@pytest.mark.parametrize(
    ("version", "held", "changes", "base"),
    [
        (0, None, {}, 0),
        (5, 5, kept(1, 1, 1, 1, 1), 5),
        (5, 4, kept(9, 9, 9, 9, 9), 4),
        (5, None, kept(9, 9, 9, 9, 9), 0),
        (5, None, kept(9, 9, 9, first=3), None),
        (5, 1, kept(9, 9, 9, first=3), None),
        (5, 2, kept(9, 9, 9, first=3), 2),
        (5, 2, kept(9, SNAPSHOT, 9, first=3), None),
        (2, None, kept(SNAPSHOT // 2, SNAPSHOT // 2 - REQUEST_BYTES), 0),
        (2, None, kept(SNAPSHOT // 2, SNAPSHOT // 2), None),
        (5, 9, kept(9, 9, 9, 9, 9), 0),
    ],
)
def test_the_way_of_the_fewest_bytes_is_taken(version, held, changes, base):
    """From what the device holds, from the start that all have, or by the snapshot, if that is smaller."""
    assert cheapest_base(version, held, changes, SNAPSHOT) == base


def lossy(**changes):
    """A run with a shared model, and its fleet of two."""
    return h.start(h.plan(rounds=20, **changes), vector_sha256="0" * 64, elements=1000), h.fleet("a", "b")


def close(state, fleet, number, *, change=900, snapshot=4000, now=2.0):
    """The next model is there; the jobs of the next round by device."""
    event = e.Aggregated(
        now,
        state.run.round,
        h.blob(100 + number),
        down=h.blob(200 + number, snapshot),
        change=h.blob(300 + number, change),
        vector_sha256=f"{number:064}",
    )
    return {row.device: row for row in h.jobs(step(state, event, fleet))}


def play(state, fleet, rounds, *, absent="", **sizes):
    """Rounds in which all answer but ``absent``; the open jobs by device."""
    jobs = {row.device: row for row in h.jobs(step(state, e.Tick(0.0), fleet))}
    for _ in range(rounds):
        for device in sorted(jobs.keys() - {absent}):
            step(state, h.arrived(jobs[device], number=state.run.round), fleet)
        jobs = close(state, fleet, state.run.round + 1, **sizes)
    return jobs


def test_each_round_brings_the_change_since_the_last_one():
    """Version 0 is made from the bundle; then each device starts from what it trained on."""
    state, fleet = lossy()
    jobs = {row.device: row for row in h.jobs(step(state, e.Tick(0.0), fleet))}
    assert state.model_of(jobs["a"]) == ModelRef(base=0, blobs=[], vector_sha256="0" * 64)
    for device in "ab":
        step(state, h.arrived(jobs[device]), fleet)
    jobs = close(state, fleet, 1)
    assert state.model_of(jobs["a"]) == ModelRef(base=0, blobs=[h.blob(301, 900)], vector_sha256=f"{1:064}")
    for device in "ab":
        step(state, h.arrived(jobs[device]), fleet)
    jobs = close(state, fleet, 2)
    assert state.model_of(jobs["a"]) == ModelRef(base=1, blobs=[h.blob(302, 900)], vector_sha256=f"{2:064}")


@pytest.mark.parametrize(("missed", "base"), [(1, 1), (2, 1), (6, None)])
def test_a_device_that_missed_versions_gets_what_is_smaller(missed, base):
    """The changes it missed, or the snapshot where these are more bytes."""
    state, fleet = lossy(target=2, minimum=1, max_staleness=9)
    play(state, fleet, 1)
    for device in "ab":
        name = state.by_device[device][-1]
        step(state, h.arrived(state.assignments[name], number=9), fleet)
    fleet.announce(5.0, h.device("b", online=False))
    close(state, fleet, 2)
    for number in range(missed - 1):
        step(state, e.Tick(50.0 + 20 * number), fleet)
        step(state, e.Tick(61.0 + 20 * number), fleet)
        (job,) = [state.assignments[name] for name in state.by_device["a"] if state.assignments[name].status == "open"]
        step(state, h.arrived(job, 62.0), fleet)
        step(state, e.Tick(200.0 + 100 * number), fleet)
        close(state, fleet, 3 + number)
    fleet.announce(900.0, h.device("b", session="s2"))
    effects = step(state, e.DeviceJoined(900.0, "b"), fleet)
    (job,) = [row for row in h.jobs(effects) if row.device == "b"]
    assert (job.version, job.base_version) == (state.run.version, base)
    wanted = [h.blob(300 + version, 900) for version in range(2, state.run.version + 1)]
    assert state.model_of(job).blobs == (wanted if base else [state.run.down])


def test_a_device_that_lost_its_model_gets_the_same_job_another_way():
    """It says no, and gets the whole model at once; a second no ends the job."""
    state, fleet = lossy()
    jobs = play(state, fleet, 6)
    assert jobs["a"].base_version == 5
    refusal = e.JobReported(3.0, "a", jobs["a"].assignment, "version 5 is not on this device", rejected=True)
    effects = step(state, refusal, fleet)
    (again,) = h.jobs(effects)
    assert (again.assignment, again.base_version) == (jobs["a"].assignment, None)
    assert state.model_of(again) == ModelRef(blobs=[h.blob(206, 4000)], vector_sha256=f"{6:064}")
    rows = h.one(e.Save, effects).rows
    assert e.HoldingRow(run="run", device="a", version=None) in rows
    assert again in rows
    assert "a" not in state.held
    step(state, refusal, fleet)
    assert state.assignments[again.assignment].status == "failed"


def test_after_a_failure_nothing_is_taken_for_granted():
    """The next job starts from the bundle, or is a whole model, whichever is smaller."""
    state, fleet = lossy(minimum=1)
    jobs = play(state, fleet, 2)
    step(state, e.JobReported(3.0, "a", jobs["a"].assignment, "too hot"), fleet)
    step(state, h.arrived(jobs["b"]), fleet)
    assert state.held == {"b": 2}
    assert close(state, fleet, 3, now=99.0)["a"].base_version == 0  # a while after its failure
    state, fleet = lossy(minimum=1)
    jobs = play(state, fleet, 2, change=3000)
    step(state, e.JobReported(3.0, "a", jobs["a"].assignment, "too hot"), fleet)
    step(state, h.arrived(jobs["b"]), fleet)
    jobs = close(state, fleet, 3, change=3000, now=99.0)
    assert (jobs["a"].base_version, jobs["b"].base_version) == (None, 2)


def test_changes_are_kept_as_long_as_somebody_may_ask():
    """The last ``chain`` ones, and those that an open job names."""
    state, fleet = lossy(minimum=1, max_staleness=4, downlink=Downlink(codec="raw", chain=2))
    play(state, fleet, 2)
    (slow,) = [row for row in state.assignments.values() if row.device == "b" and row.status == "open"]
    assert (slow.base_version, slow.version) == (1, 2)
    for number in range(3, 6):
        (job,) = [row for row in state.assignments.values() if row.device == "a" and row.status == "open"]
        step(state, h.arrived(job, 3.0), fleet)
        step(state, e.Tick(1000.0 * number), fleet)
        close(state, fleet, number)
        step(state, e.Tick(1000.0 * number + 500), fleet)
    assert state.run.version == 5
    assert [version for version in range(1, 6) if state.needs_change(version)] == [2, 4, 5]
    rows = [state.run, *state.assignments.values()]
    assert slow in [effect.assignment for effect in resume(state) if isinstance(effect, e.SendJob)]
    assert state.model_of(slow).blobs == [h.blob(302, 900)]
    assert RunState.from_rows(state.plan, rows).assignments == state.assignments
    step(state, h.arrived(slow, 9000.0), fleet)
    assert [version for version in range(1, 6) if state.needs_change(version)] == [4, 5]


@pytest.mark.parametrize(
    ("size", "chunk", "devices", "inside"),
    [
        (300, 98304, 10_000, True),
        (INLINE_BYTES + 1, 98304, 1000, False),
        (INLINE_BYTES + 1, 98304, 10, True),
        (65_537, 98304, 10, False),
        (900, 2560, 1, False),
    ],
)
def test_a_small_last_blob_travels_inside_the_job(tmp_path, size, chunk, devices, inside):
    """It needs no request then; a large one, or one for a broker with small packets, is asked for."""
    blobs = BlobStore(tmp_path)
    stored = blobs.put(bytes(size))
    model = ModelRef(base=3, blobs=[h.blob(1), BlobRef(sha256=stored.sha256, size_bytes=size)], vector_sha256="0" * 64)
    assert inline_bytes(blobs, model, chunk, devices) == (bytes(size) if inside else b"")


def test_a_job_says_how_its_update_is_encoded():
    """The plan's options go with the plan's codec, and with no other."""
    plan = h.plan(uplink=Uplink(codec="topk", options={"clip_norm": 2.0}))
    state = h.start(plan)
    row = e.AssignmentRow(
        run="run", assignment="r0-0", device="a", round=0, version=0, model=h.blob(2), codec="topk", byte_budget=99,
        assigned_unix_s=0.0, deadline_unix_s=9.0,
    )  # fmt: skip
    job = make_job(plan, state.run, row, state.model_of(row), now=1.0, chunk_bytes=1024)
    assert (job.codec, job.codec_options, job.byte_budget) == ("topk", {"clip_norm": 2.0}, 99)
    assert job.model == ModelRef(blobs=[BlobRef(sha256=h.blob(2).sha256, size_bytes=100, chunk_bytes=1024)])
    row.codec = "raw"
    assert make_job(plan, state.run, row, state.model_of(row), now=1.0, chunk_bytes=1024).codec_options == {}
