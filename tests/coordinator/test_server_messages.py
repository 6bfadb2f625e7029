"""What devices say to a server beside updates: heartbeats, pulls, declined jobs, doubtful figures."""

from __future__ import annotations

import logging
import zlib

import msgspec
import numpy as np
import pytest

from coordinator import events as e
from coordinator.plan import Training
from coordinator.server import Coordinator
from coordinator.settings import ServerSettings
from edge_runtime import messages
from edge_runtime.messages import Heartbeat, UpdateMeta, encode_heartbeat
from tests.coordinator import helpers as h
from tests.coordinator.test_checking import until
from tests.edge_runtime import toy_bundle

pytestmark = pytest.mark.usefixtures("mosquitto_program")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that was made, not started; ``sent`` has what it says to devices, by device."""
    made = Coordinator(ServerSettings(state_dir=tmp_path))
    made.sent = []

    def publish(topic, payload, **_):
        if topic.startswith("fl/v1/c/") and topic.endswith("/message"):
            made.sent.append((topic.split("/")[3], messages.decode_from_coordinator(payload)))
        return True

    monkeypatch.setattr(made.link, "publish", publish)
    made.link.is_up = True
    yield made
    made.close()


def taken_up(server, plan, *devices):
    """A run that the server has taken up; its state."""
    state = h.start(plan)
    state.run.run = server.store.submit(plan, state.run)
    bundle = server.store.blobs.put_file(toy_bundle.write_bundle(server.settings.state_dir / "toy.bundle"))
    state.run.bundle = h.BlobRef(sha256=bundle.sha256, size_bytes=bundle.size_bytes)
    server.store.save([state.run])
    server.shell._take_up(server.store.run(state.run.run))
    for name in devices:
        server._announced(server.clock(), h.device(name, abilities=["standing"]))
    return server.shell.runs[state.run.run]


def says(server, device, message):
    server._on_message(f"fl/v1/d/{device}/message", messages.encode(message))


def said(server, kind):
    return [message for _, message in server.sent if isinstance(message, kind)]


def test_heartbeats_are_heard_whatever_they_say(server, caplog):
    """Retained ones before the announcement, too; garbage is one line in the log."""
    beat = Heartbeat(uptime_s=5, battery_percent=40, clock_unix_s=1)
    server._on_message("fl/v1/d/a/heartbeat", encode_heartbeat(beat))
    server._announced(1.0, h.device("a"))
    assert server.fleet.get("a").heartbeat == beat
    server._on_message("fl/v1/d/a/heartbeat", b"")
    server._on_message("fl/v1/d/a/heartbeat", b"\xff" * 60)
    assert server.fleet.get("a").heartbeat == beat
    assert "heartbeat refused" in caplog.text


def test_telemetry_of_older_agents_becomes_a_heartbeat(server):
    """What it does not say stays unknown; NaN does no harm."""
    server._announced(1.0, h.device("a"))
    telemetry = messages.Telemetry(
        uptime_s=float("nan"), clock_unix_s=5.0, temperature_c=61.4, battery_percent=38.0, on_external_power=False
    )
    says(server, "a", telemetry)
    beat = server.fleet.get("a").heartbeat
    assert (beat.battery_percent, beat.temperature_c, beat.on_external_power) == (38, 61, False)
    assert beat.availability_percent is None
    assert server.fleet.get("a").row().heartbeat == beat


def test_a_device_that_leaves_is_told_in_the_log_once(server, caplog):
    """Like one that joins."""
    caplog.set_level(logging.INFO, "edge.coordinator")
    server._announced(1.0, h.device("a"))
    for _ in range(2):
        server._announced(2.0, h.device("a", online=False))
    lines = [line for line in caplog.messages if line.startswith("device a ")]
    assert lines == ["device a joined", "device a left"]


def test_a_job_that_its_owner_forbids_is_no_warning(server, caplog):
    """It is told as declined with the device's reason, and another device is asked."""
    caplog.set_level(logging.INFO, "edge.coordinator")
    state = taken_up(server, h.plan(target=1, deadline_s=1e6), "a", "b")
    (job,) = state.assignments.values()
    status = messages.JobStatus(
        run=job.run, assignment=job.assignment, status="rejected", reason="only at night", declined_s=600.0
    )
    says(server, job.device, status)
    assert state.assignments[job.assignment].status == "declined"
    assert len(state.assignments) == 2
    (record,) = [record for record in caplog.records if "declined" in record.getMessage()]
    assert record.levelname == "INFO"
    assert record.getMessage() == f"{job.device} declined job {job.run}/{job.assignment}: only at night"
    rows = server.store.histories(job.run)
    assert next(row for row in rows if row.device == job.device).not_before_unix_s > server.clock() + 500.0


def test_an_anarchic_device_pulls_and_gets_its_job(server):
    """A standing assignment, a pull with the steps it chose, a job with the number; the same for one that joins."""
    plan = h.plan(mode="anarchic", target=1, deadline_s=1e6, training=Training(steps=9))
    state = taken_up(server, plan, "a")
    (standing,) = said(server, messages.Standing)
    assert (standing.sequence, standing.max_steps, standing.dataset) == (0, 9, "digits")
    says(server, "a", messages.Pull(run=standing.run, assignment=standing.assignment, sequence=0, steps=4))
    (job,) = said(server, messages.Job)
    assert (job.sequence, job.steps, job.assignment) == (0, 4, standing.assignment)
    server.sent.clear()
    server._announced(9.0, h.device("a", session="s2", abilities=["standing"]))
    assert [type(message) for _, message in server.sent] == [messages.Standing, messages.Job]
    assert said(server, messages.Standing)[0].sequence == 0
    assert state.pulls == 1


def test_a_pull_for_a_run_that_has_ended_is_answered(server, caplog):
    """The device stops pulling; one with an absurd number is ignored."""
    says(server, "a", messages.Pull(run="gone-1", assignment="r0-0", sequence=0, steps=4))
    (cancel,) = said(server, messages.Cancel)
    assert (cancel.run, cancel.assignment) == ("gone-1", "r0-0")
    says(server, "a", messages.Pull(run="gone-1", assignment="r0-0", sequence=1 << 60, steps=4))
    assert len(said(server, messages.Cancel)) == 1
    assert "ignored" in caplog.text


def test_the_servers_hyper_parameters_reach_the_jobs(server):
    """Those that the server optimiser set for this version go over those of the plan."""
    plan = h.plan(target=1, training=Training(epochs=1, hyper={"lr": 0.1, "momentum": 0.5}))
    state = taken_up(server, plan)
    state.run.hyper = {"lr": 0.02}
    server._announced(1.0, h.device("a"))
    (job,) = said(server, messages.Job)
    assert job.hyper == {"lr": 0.02, "momentum": 0.5}


def test_what_cannot_be_true_is_said_once_and_counts_all_the_same(server, caplog):
    """Of one device in one run; the update is taken in, its history does not hold the figure."""
    state = taken_up(server, h.plan(target=1, deadline_s=1e6, rounds=5), "a")
    layout = server.shell.files[state.run.run].bundle.layout()
    for round_ in range(2):
        job = next(row for row in state.assignments.values() if row.status == "open")
        data = h.encoded(np.ones(layout.size, np.float32), layout, h.update_id(job), version=round_)
        meta: UpdateMeta = msgspec.structs.replace(h.meta(job), loss_rms=1e30)
        first = zlib.crc32(data).to_bytes(4, "little") + data
        server.shell._aggregate = lambda *_: None
        says(server, "a", messages.UpdateOffer(update=h.update_id(job), meta=meta, first=first))
        until(server.loop, lambda job=job: h.update_id(job) in state.updates)
        assert state.histories["a"].loss_rms is None
        server.shell._step(job.run, e.Aggregated(server.clock(), round_, h.blob(20 + round_)))
    lines = [line for line in caplog.messages if "taken as unknown" in line]
    assert lines == [f"device a, run {state.run.run} reports a root mean squared loss of 1e+30: taken as unknown"]
