"""The embedded broker, both kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("coordinator.broker")

from coordinator.broker import USERNAME, password_file, start_broker
from edge_runtime.errors import TransportError
from edge_runtime.transport.loop import Loop
from tests.support.brokers import Peer, free_port, run_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["mosquitto", "amqtt"])
def kind(request):
    if request.param == "amqtt":
        pytest.importorskip("amqtt")
    else:
        request.getfixturevalue("mosquitto_program")
    return request.param


@pytest.fixture
def broker(kind, tmp_path):
    broker, url = start_broker(tmp_path / "broker", prefer=kind)
    yield broker, url, tmp_path / "broker"
    broker.stop()


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


def test_only_the_right_user_and_password_come_in(broker, kind, loop):
    """Anonymous clients, other users and wrong passwords are refused; the password file opens the door."""
    started, url, folder = broker
    assert started.kind == kind
    word = password_file(folder).read_text()
    wrong = [
        {},
        {"username": USERNAME},
        {"username": USERNAME, "password": lambda: "x"},
        {"username": "root", "password": lambda: word},
    ]
    peers = [Peer(loop, url, f"p{number}", protocol="3.1.1", **options) for number, options in enumerate(wrong)]
    for peer in peers:
        peer.link.start()
    run_until(loop, lambda: all(len(peer.downs) >= 2 for peer in peers))
    good = Peer(loop, url, "good", username=USERNAME, password=lambda: word, protocol="3.1.1").up()
    good.link.publish("t/x", b"1")
    run_until(loop, lambda: good.got)
    assert [peer.ups for peer in peers] == [0, 0, 0, 0]
    for peer in [*peers, good]:
        peer.link.stop()


def test_password_is_secret_and_new_at_every_start(kind, tmp_path):
    """Each start writes another long password into a file only its owner reads; no other file holds it."""
    words = set()
    for _ in range(2):
        broker, _ = start_broker(tmp_path, prefer=kind)
        path = password_file(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o600
        words.add(path.read_text())
        for other in tmp_path.iterdir():
            assert other == path or path.read_bytes() not in other.read_bytes()
        broker.stop()
    assert len(words) == 2
    assert min(map(len, words)) >= 40


def test_it_listens_on_loopback_only(broker):
    """The broker is not reachable over the network."""
    started, _, _ = broker
    process = psutil.Process(started.process.pid) if started.kind == "mosquitto" else psutil.Process()
    listening = [c.laddr for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == started.port} == {"127.0.0.1"}
    if started.kind == "mosquitto":
        assert len(listening) == 1


def test_wanted_port_is_taken_and_a_taken_one_is_refused(kind, tmp_path):
    """A port given by number is used, and where it is taken the error says that the broker did not start."""
    port = free_port()
    broker, url = start_broker(tmp_path / "a", port=port, prefer=kind)
    assert url == f"mqtt://127.0.0.1:{port}"
    with pytest.raises(TransportError):
        start_broker(tmp_path / "b", port=port, prefer=kind)
    broker.stop()


def test_without_mosquitto_amqtt_takes_over(tmp_path, monkeypatch):
    """Where mosquitto is not installed the broker comes from pip."""
    pytest.importorskip("amqtt")
    monkeypatch.setattr("coordinator.broker.mosquitto_path", lambda: None)
    broker, _ = start_broker(tmp_path)
    assert broker.kind == "amqtt"
    broker.stop()
    broker.stop()


PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from coordinator.broker import start_broker
broker, _ = start_broker(Path(sys.argv[1]))
print(broker.process.pid, flush=True)
time.sleep(600)
"""


def test_mosquitto_dies_with_its_parent(mosquitto_program, tmp_path):
    """kill -9 of the coordinator leaves no broker behind."""
    assert mosquitto_program
    child = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, env=os.environ
    )
    broker = psutil.Process(int(child.stdout.readline()))
    child.kill()
    child.wait()
    child.stdout.close()
    broker.wait(timeout=20)
