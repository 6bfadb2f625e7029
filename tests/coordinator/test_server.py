"""The server around the round machine: its lock, its heartbeat, and what it logs."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import zlib

import msgspec
import numpy as np
import pytest

from coordinator import cli
from coordinator import events as e
from coordinator.server import Coordinator
from coordinator.settings import ServerSettings
from coordinator.store import Store
from edge_runtime import messages
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.messages import Evaluation
from edge_runtime.transport.link import packet_bytes
from tests.coordinator import helpers as h
from tests.edge_runtime import toy_bundle

pytestmark = pytest.mark.usefixtures("mosquitto_program")


@pytest.fixture
def server(tmp_path):
    """A server that was made, not started."""
    made = Coordinator(ServerSettings(state_dir=tmp_path))
    yield made
    made.close()


def test_a_second_server_on_one_folder_is_refused(server, tmp_path, capsys):
    """One line and exit code 2, and it touches nothing of the first one's."""
    password = (tmp_path / "broker" / "broker-password").read_text()
    assert cli.main(["serve", "--state", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "another coordinator runs on this state folder" in err
    assert err.count("\n") == 1
    assert (tmp_path / "broker" / "broker-password").read_text() == password
    assert server.settings.state_dir == tmp_path


def test_the_folder_is_free_again_after_a_failed_start_and_after_the_end(tmp_path):
    """Neither an error in the start nor a server that was closed keeps the lock."""
    with pytest.raises((TransportError, ConfigError)):
        Coordinator(ServerSettings(state_dir=tmp_path, broker_url="http://x"))
    for _ in range(2):
        Coordinator(ServerSettings(state_dir=tmp_path)).close()


def test_a_server_says_that_it_lives_and_that_it_stops(tmp_path):
    """Other processes know at once when it starts and when it is stopped."""
    server, store = Coordinator(ServerSettings(state_dir=tmp_path)), Store(tmp_path)
    assert not store.server_running(time.time())
    server.start()
    assert store.server_running(time.time())
    server.close()
    assert not store.server_running(time.time())
    store.close()


def test_the_start_tells_how_to_reach_the_broker(server, tmp_path, caplog):
    """URL, user name and password file, as they stand in connection.json."""
    caplog.set_level(logging.INFO, "edge.coordinator")
    server.start()
    end = time.monotonic() + 20
    while not (tmp_path / "connection.json").exists() and time.monotonic() < end:
        server.loop.step(0.05)
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("broker: "))
    secret = re.escape(str((tmp_path / "broker" / "broker-password").resolve()))
    assert re.match(rf"broker: mqtt://127.0.0.1:\d+, user edge, password in {secret} ", line)
    assert "connection.json" in line


def test_one_line_per_closed_round(server, caplog):
    """With the accuracy on the test set where that is wanted, then only when it is known."""
    caplog.set_level(logging.INFO, "edge.coordinator")
    server.shell.runs["run"] = h.start(h.plan(rounds=3, test_set="t", evaluate_every=2))
    row = e.RoundRow(
        run="run",
        round=0,
        version=1,
        model=h.blob(1),
        opened_unix_s=10.0,
        closed_unix_s=12.5,
        updates=1,
        late_updates=0,
        samples=8,
        bytes_up=2000,
        bytes_down=300,
        devices=Evaluation(samples=4, loss_sum=1.0, correct=3),
    )
    later = msgspec.structs.replace(row, round=1, version=2, updates=2)
    test = Evaluation(samples=2, loss_sum=1.0, correct=1)
    for entry in (row, later, msgspec.structs.replace(later, test=test)):
        server.shell._carry_out("run", e.Save([entry]))
    assert caplog.messages == [
        "run run: round 1 of 3: 1 update (0 late), accuracy 75.00 %, 2.0 kB up, 300 B down, 2.50 s",
        "run run: round 2 of 3: 2 updates (0 late), accuracy 50.00 %, 2.0 kB up, 300 B down, 2.50 s",
    ]


def submitted(server, plan, **changes):
    """A run that the server has taken up; its state."""
    state = h.start(plan, **changes)
    state.run.run = server.store.submit(plan, state.run)
    bundle = server.store.blobs.put_file(toy_bundle.write_bundle(server.settings.state_dir / "toy.bundle"))
    state.run.bundle = h.BlobRef(sha256=bundle.sha256, size_bytes=bundle.size_bytes)
    server.store.save([state.run])
    server.shell._take_up(server.store.run(state.run.run))
    return server.shell.runs[state.run.run]


def checked(server):
    """Lets the server go on until it checks nothing any more."""
    end = time.monotonic() + 20
    while server.shell._checks._running and time.monotonic() < end:
        server.loop.step(0.05)


def test_bytes_are_counted_for_the_run_that_they_are_about(server, monkeypatch):
    """Offers, requests and reports up; jobs and chunks down, bundles apart; nothing of runs that have ended."""
    sent = []
    monkeypatch.setattr(server.link, "publish", lambda topic, payload, **_: sent.append((topic, payload)) or True)
    server.link.is_up = True
    first, second = (submitted(server, h.plan(target=1, name=name)) for name in ("one", "two"))
    server._announced(1.0, h.device("a", limits=None))
    shell, names = server.shell, [state.run.run for state in (first, second)]
    own = [payload for topic, payload in sent if topic.endswith("c/a/message")]
    for state, payload in zip((first, second), own, strict=True):
        assert messages.decode_from_coordinator(payload).run == state.run.run
        assert shell.traffic._of[state.run.run] == (4, packet_bytes("fl/v1/c/a/message", len(payload)), 0)
    shell.traffic._of.clear()
    (job,) = first.assignments.values()
    offer = messages.UpdateOffer(update=h.update_id(job), blob=h.blob(9), meta=h.meta(job))
    status = messages.JobStatus(run=names[1], assignment="r0-9", status="failed")
    need = messages.Need(sha256=first.run.bundle.sha256, ranges=[(0, 1)])
    answered = len(sent)
    for message in (offer, status, messages.Need(sha256=h.blob(99).sha256, ranges=[])):
        server._on_message("fl/v1/d/a/message", messages.encode(message))
    asked, *jobs, _gone = [packet_bytes(topic, len(payload)) for topic, payload in sent[answered:]]
    assert len(jobs) == 2  # the deadline has passed, by the clock, so both runs ask again
    offered, reported = (
        packet_bytes("fl/v1/d/a/message", len(messages.encode(message))) for message in (offer, status)
    )
    assert shell.traffic._of == {
        names[0]: (offered + 4 + 4, 4 + asked + jobs[0], 0),
        names[1]: (reported + 4, 4 + jobs[1], 0),
    }
    shell.traffic._of.clear()
    server._on_message("fl/v1/d/a/message", messages.encode(need))
    shell.downlink._flush(need.sha256) if need.sha256 in shell.downlink._gathering else None
    counted = shell.traffic._of[names[0]]
    assert counted.bundle == counted.down - 4 == packet_bytes("fl/v1/c/a/chunk", 24 + first.run.bundle.size_bytes)
    shell._step(names[0], e.StopRequested(5.0))
    assert names[0] not in shell.traffic._of
    row = server.store.run(names[0]).row
    assert row.bytes_down > counted.down
    assert row.bytes_up == counted.up + 4  # of the cancellation


def test_a_round_whose_first_bytes_a_restart_forgot_is_not_called_complete(server, monkeypatch):
    """Only that round: those before and after it are counted whole. A run that was never at work has lost nothing."""
    monkeypatch.setattr(server.link, "publish", lambda *_, **__: True)
    server.link.is_up = True
    shell, name = server.shell, submitted(server, h.plan(target=1, rounds=3, deadline_s=1e9)).run.run
    server._announced(1.0, h.device("a"))
    monkeypatch.setattr(shell, "_aggregate", lambda *_: None)
    for round_ in range(3):
        if round_ == 1:
            shell.runs.clear()
            shell._take_up(server.store.run(name))
        (job,) = [row for row in shell.runs[name].assignments.values() if row.status == "open"]
        shell._step(name, h.arrived(job, number=round_))
        shell._step(name, e.Aggregated(2.0, round_, h.blob(50 + round_)))
    assert [row.bytes_complete for row in server.store.rounds(name)] == [True, False, True]
    again = submitted(server, h.plan(target=9, name="again")).run.run
    shell.runs.clear()
    shell._take_up(server.store.run(again))
    assert shell.runs[again].run.bytes_complete


def test_an_offer_without_a_reference_is_all_of_its_update(server, monkeypatch):
    """Hash and size are those of the chunk it carries; a damaged one is not believed."""
    monkeypatch.setattr(server.link, "publish", lambda *_, **__: True)
    server.link.is_up = True
    state = submitted(server, h.plan(target=1))
    server._announced(1.0, h.device("a"))
    (job,) = state.assignments.values()
    layout = server.shell.files[state.run.run].bundle.layout()
    data = h.encoded(np.ones(layout.size, np.float32), layout, h.update_id(job))
    for crc in (1, zlib.crc32(data)):
        first = crc.to_bytes(4, "little") + data
        offer = messages.UpdateOffer(update=h.update_id(job), meta=h.meta(job), first=first)
        server._on_message("fl/v1/d/a/message", messages.encode(offer))
        checked(server)
        assert list(state.updates) == ([] if crc == 1 else [h.update_id(job)])
    assert state.updates[h.update_id(job)].blob.sha256 == hashlib.sha256(data).hexdigest()


def test_a_device_that_goes_offline_is_replaced_at_once(server):
    """Its last will is enough; the will of a connection that it has replaced itself is not."""
    plan = h.plan(target=1, deadline_s=1000.0)
    state = h.start(plan)
    state.run.run = server.store.submit(plan, state.run)
    server.shell.runs[state.run.run] = state
    server._announced(1.0, h.device("a", session="s2"))
    server.shell._step(state.run.run, e.Tick(2.0))
    server._announced(3.0, h.device("b"))
    server._announced(4.0, h.device("a", session="s1", online=False))
    assert [row.device for row in state.assignments.values()] == ["a"]
    server._announced(5.0, h.device("a", session="s2", online=False))
    assert [(row.device, row.status, row.away) for row in server.store.assignments(state.run.run, 0)] == [
        ("a", "open", True),
        ("b", "open", False),
    ]
