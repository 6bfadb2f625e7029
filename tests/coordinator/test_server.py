"""The server around the round machine: its lock, its heartbeat, and what it logs."""

from __future__ import annotations

import logging
import re
import time
from types import SimpleNamespace

import msgspec
import pytest

from coordinator import cli
from coordinator import events as e
from coordinator.server import Coordinator
from coordinator.settings import ServerSettings
from coordinator.store import Store
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.messages import Evaluation
from tests.coordinator import helpers as h

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


def test_bytes_of_an_ended_run_are_no_other_runs(server):
    """What was transferred for a run that ended is forgotten, but not that of blobs another run sends too."""
    shell, own, shared = server.shell, h.blob(1), h.blob(2)
    shell.files["a"] = SimpleNamespace(sent_blobs={own.sha256: own, shared.sha256: shared})
    shell.files["b"] = SimpleNamespace(sent_blobs={shared.sha256: shared})
    shell.downlink.sent_bytes.update({own.sha256: 5, shared.sha256: 7})
    shell.uplink.received_bytes.update(a=3, b=4)
    shell._finished("a", "failed", "")
    assert shell.downlink.sent_bytes == {shared.sha256: 7}
    assert shell.uplink.received_bytes == {"b": 4}
    shell._finished("b", "failed", "")
    assert shell.downlink.sent_bytes == {}


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
