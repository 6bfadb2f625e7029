"""The link against real brokers."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paho.mqtt.client import DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge_runtime.errors import ConfigError, MessageError
from edge_runtime.transport.link import CHUNK_BYTES, Link, parse_url
from edge_runtime.transport.loop import Loop
from tests.support.brokers import Peer, free_port, own_mosquitto, run_until
from tests.support.proxy import Proxy

ROOT = Path(__file__).parents[3]


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def broker(mosquitto_program, tmp_path):
    with own_mosquitto(mosquitto_program, tmp_path) as broker:
        yield broker


@pytest.fixture
def peers(loop):
    """Makes links that are stopped at the end."""
    made: list[Peer] = []

    def make(url: str, name: str = "dev", **options) -> Peer:
        made.append(Peer(loop, url, name, **options))
        return made[-1]

    yield make
    for peer in made:
        peer.link.stop()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mqtt://broker.example", "unencrypted"),
        ("mqtt://10.0.0.5:1883", "unencrypted"),
        ("ws://localhost", "malformed"),
        ("localhost:1883", "malformed"),
        ("mqtt://:1883", "malformed"),
        ("mqtt://localhost:port", "malformed"),
        ("mqtt://localhost:99999", "malformed"),
    ],
)
def test_unusable_urls_are_refused(url, said):
    """Plain MQTT over a network and malformed URLs are refused, and the error shows the URL and the cure."""
    with pytest.raises(ConfigError, match=said):
        parse_url(url)


def test_usable_urls():
    """TLS anywhere, plain on loopback, plain elsewhere only where it was allowed; ports have defaults."""
    assert parse_url("mqtts://broker.example") == parse_url("mqtts://broker.example:8883")
    assert parse_url("mqtt://localhost").port == 1883
    assert parse_url("mqtt://[::1]:7").host == "::1"
    assert parse_url("mqtt://10.0.0.5", insecure=True).tls is False


def test_publish_reaches_a_subscriber_and_is_acknowledged(loop, broker, peers):
    """A published message arrives, its sender hears that the broker has it, and bytes are counted."""
    a, b = peers(broker.url, "a").up(), peers(broker.url, "b").up()
    sent = []
    assert a.link.publish("t/x", b"hello", on_sent=lambda: sent.append(1))
    run_until(loop, lambda: b.got and sent)
    assert b.got == [("t/x", b"hello")]
    assert a.link.sent_bytes > 5
    assert b.link.received_bytes > 5


def test_publish_while_down_says_no(peers):
    """Nothing is queued behind the caller's back while the link is down."""
    peer = peers(f"mqtt://127.0.0.1:{free_port()}")
    assert peer.link.publish("t/x", b"") is False
    peer.link.subscribe("t/y")
    peer.link.unsubscribe("t/y")


def test_order_is_kept_over_hundreds_of_large_messages(loop, broker, peers):
    """Many messages in flight arrive once each and in order."""
    a, b = peers(broker.url, "a").up(), peers(broker.url, "b").up()
    for number in range(200):
        a.link.publish("t/x", number.to_bytes(4, "big") + bytes(50_000))
    run_until(loop, lambda: len(b.got) == 200)
    assert [int.from_bytes(payload[:4], "big") for _, payload in b.got] == list(range(200))


def test_broker_killed_and_restarted_on_the_same_port(loop, broker, peers):
    """After kill -9 of the broker the link says it is down, tries with growing pauses, and comes up subscribed."""
    a, b = peers(broker.url, "a").up(), peers(broker.url, "b").up()
    broker.kill()
    run_until(loop, lambda: len(a.downs) >= 4 and len(b.downs) >= 4)
    assert not a.link.is_up
    assert "refused" in a.downs[-1]
    broker.start()
    run_until(loop, lambda: a.ups == b.ups == 2)
    a.link.publish("t/x", b"again")
    run_until(loop, lambda: b.got)


def test_back_off_doubles_up_to_its_limit_with_jitter(loop):
    """The pauses between attempts double, are spread by half, and stay under the limit."""
    pauses = []

    class Clock:
        """Jumps to the next timer."""

        def call_later(self, delay_s, _action):
            pauses.append(delay_s)

    peer = Peer(loop, f"mqtt://127.0.0.1:{free_port()}", backoff_first_s=0.2, backoff_limit_s=5.0)
    peer.link._loop = Clock()
    peer.link.start()
    for _ in range(11):
        peer.link._reconnect()
    limits = [min(5.0, 0.2 * 2**number) for number in range(12)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))
    assert len({round(pause, 6) for pause in pauses[6:]}) > 1


def test_a_connection_to_oneself_is_no_broker(loop):
    """Where nobody listens, the kernel may connect a socket to its own port: that counts as refused."""
    peer = Peer(loop, f"mqtt://127.0.0.1:{free_port()}")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        with pytest.raises(ConnectionRefusedError):
            peer.link._socket_opened(None, None, sock)


def test_broker_that_starts_later_is_found(loop, mosquitto_program, tmp_path, peers):
    """A link started before its broker keeps trying and comes up when the broker does."""
    with own_mosquitto(mosquitto_program, tmp_path, start=False) as broker:
        peer = peers(broker.url)
        peer.link.start()
        run_until(loop, lambda: len(peer.downs) >= 2)
        broker.start()
        run_until(loop, lambda: peer.ups)


def test_broker_with_small_packets_is_obeyed(loop, mosquitto_program, tmp_path, peers):
    """The packet limit of the CONNACK sets the chunk size; a larger packet is refused here, and the link stays up."""
    with own_mosquitto(mosquitto_program, tmp_path, "allow_anonymous true", "max_packet_size 40000") as broker:
        peer = peers(broker.url).up()
        assert peer.link.max_packet_bytes == 40_000
        assert peer.link.chunk_bytes == 35 * 1024
        with pytest.raises(MessageError, match="over the broker's limit 40000"):
            peer.link.publish("t/x", bytes(40_000))
        peer.link.publish("t/x", bytes(peer.link.chunk_bytes + 4000))
        run_until(loop, lambda: peer.got)
        assert (peer.ups, peer.downs) == (1, [])


@pytest.mark.parametrize("limit", [200, 4096, 5000, 16_384, 131_072])
def test_chunks_fit_any_packet_limit(loop, limit):
    """However small the packets of a broker are, a chunk with its header is smaller, and never nothing."""
    link = Peer(loop, "mqtt://localhost").link
    link.max_packet_bytes = limit
    assert 64 <= link.chunk_bytes < limit - 24
    assert link.chunk_bytes <= CHUNK_BYTES


def test_packet_limit_is_still_known_after_a_broken_handshake(loop, mosquitto_program, tmp_path, peers):
    """A connection cut before the broker answers is no reason to fall back to a protocol without packet limits."""
    with (
        own_mosquitto(mosquitto_program, tmp_path, "allow_anonymous true", "max_packet_size 40000") as broker,
        Proxy(broker.port, delay_s=0.02) as proxy,
    ):
        peer = peers(f"mqtt://127.0.0.1:{proxy.port}").up()
        for _ in range(3):
            ups = peer.ups
            proxy.cut()
            run_until(loop, lambda: not peer.link.is_up)
            run_until(loop, lambda: peer.link._fd >= 0)
            proxy.cut()
            run_until(loop, lambda ups=ups: peer.ups > ups)
            assert peer.link.max_packet_bytes == 40_000


def passwords(tmp_path, **users):
    path = tmp_path / "passwords"
    from coordinator.broker import _mosquitto_hash

    path.write_text("".join(f"{user}:{_mosquitto_hash(word)}\n" for user, word in users.items()))
    path.chmod(0o600)
    return ["allow_anonymous false", f"password_file {path}"]


def test_wrong_password_is_said_and_a_new_one_is_picked_up(mosquitto_program, tmp_path, peers, caplog):
    """A refused password is one clear line; the password is asked for at every attempt, so a new one just works."""
    lines = passwords(tmp_path, dev="right")
    asked = []

    def password():
        asked.append(1)
        return "right" if len(asked) >= 3 else "wrong"

    with own_mosquitto(mosquitto_program, tmp_path, *lines) as broker, caplog.at_level(logging.WARNING, "edge.link"):
        peer = peers(broker.url, username="dev", password=password).up()
        assert len(asked) == 3
        assert len(peer.downs) == 2
    (line,) = [record.message for record in caplog.records if "refused" in record.message]
    assert "refused 'dev': Not authorized" in line


def test_password_file_that_cannot_be_read_is_tried_again(loop, broker, peers, tmp_path, caplog):
    """A secret that is not there yet is a reason to wait, not to die, nor at once to warn."""
    caplog.set_level("INFO", "edge")
    path = tmp_path / "secret"
    peer = peers(broker.url, username="dev", password=path.read_text)
    peer.link.start()
    run_until(loop, lambda: peer.downs)
    assert peer.downs[0] == f"the password file {path} is not there yet: is the server up?"
    assert [record.levelname for record in caplog.records if "password file" in record.message] == ["INFO"]
    path.write_text("x")
    run_until(loop, lambda: peer.ups)


DIES = """
import os, sys
from tests.support.brokers import Peer
from edge_runtime.transport.loop import Loop
loop = Loop()
peer = Peer(loop, sys.argv[1], "mortal", will=("t/will", lambda: b"mortal is gone")).up()
peer.link.publish("t/hello", b"")
loop.step(0.1)
os.write(1, b"up")
loop.run()
"""


def test_will_is_delivered_when_the_process_is_killed(loop, broker, peers):
    """kill -9 of a client makes the broker publish its last will; a clean stop sends the farewell instead."""
    watcher = peers(broker.url, "watcher").up()
    child = subprocess.Popen(
        [sys.executable, "-c", DIES, broker.url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.read(2) == b"up"
    child.kill()
    child.wait()
    child.stdout.close()
    run_until(loop, lambda: ("t/will", b"mortal is gone") in watcher.got)
    clean = Peer(loop, broker.url, "clean", will=("t/will", lambda: b"clean is gone")).up()
    clean.link.stop(("t/bye", b"good-bye"))
    run_until(loop, lambda: ("t/bye", b"good-bye") in watcher.got)
    assert ("t/will", b"clean is gone") not in watcher.got
    assert clean.downs == []


def test_two_links_with_one_name_are_noticed(loop, broker, peers):
    """Two clients of one name throw each other out: both count rapid losses, from which the agent tells."""
    a, b = peers(broker.url, "same"), peers(broker.url, "same")
    a.link.start()
    b.link.start()
    run_until(loop, lambda: a.link.rapid_losses >= 3 and b.link.rapid_losses >= 3)


def test_mqtt_311_only_broker_works_after_falling_back(loop, tmp_path, peers, monkeypatch):
    """A broker that speaks no MQTT 5 (amqtt) is reached with 3.1.1 by itself."""
    pytest.importorskip("amqtt")
    monkeypatch.setattr("edge_runtime.transport.link.ANSWER_TIMEOUT_S", 0.5)  # amqtt never answers an MQTT 5 client
    from coordinator.broker import USERNAME, password_file, start_broker

    broker, url = start_broker(tmp_path, prefer="amqtt")
    try:
        word = password_file(tmp_path).read_text()
        a = peers(url, "a", username=USERNAME, password=lambda: word).up()
        b = peers(url, "b", username=USERNAME, password=lambda: word, protocol="3.1.1").up()
        a.link.publish("t/x", bytes(60_000))
        run_until(loop, lambda: len(b.got) == 1)
    finally:
        for peer in (a, b):
            peer.link.stop()
        broker.stop()


def make_pki(folder: Path, *names: str) -> None:
    """A certificate authority, a server certificate for loopback, and one client certificate per name."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def key(name: str) -> None:
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")

    folder.mkdir()
    key("ca")
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]  # Python 3.13 checks strictly
    openssl("req", "-x509", "-new", "-key", "ca.key", "-days", "2", "-subj", "/CN=test ca", *usage, "-out", "ca.crt")
    (folder / "server.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth\n")
    for name in ("server", *names):
        key(name)
        openssl("req", "-new", "-key", f"{name}.key", "-subj", f"/CN={name}", "-out", f"{name}.csr")
        extension = "server.ext" if name == "server" else "client.ext"
        sign = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"]
        openssl(*sign, "-days", "2", "-extfile", extension, "-out", f"{name}.crt")


ACL = """pattern write fl/v1/d/%u/#
pattern read fl/v1/c/%u/#
pattern read fl/v1/b/#
user coord
topic read fl/v1/d/#
topic write fl/v1/c/#
topic write fl/v1/b/#
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls") / "pki"
    try:
        make_pki(folder, "coord", "dev1", "dev2")
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder


@pytest.fixture
def tls_broker(mosquitto_program, tmp_path, pki):
    acl = tmp_path / "acl"
    acl.write_text(ACL)
    acl.chmod(0o600)
    lines = [
        f"cafile {pki}/ca.crt",
        f"certfile {pki}/server.crt",
        f"keyfile {pki}/server.key",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {acl}",
    ]
    with own_mosquitto(mosquitto_program, tmp_path, *lines) as broker:
        yield broker


def identity(pki: Path, name: str) -> dict[str, str]:
    return {"ca_file": f"{pki}/ca.crt", "certificate_file": f"{pki}/{name}.crt", "key_file": f"{pki}/{name}.key"}


def test_device_with_a_certificate_writes_only_its_own_topics(loop, tls_broker, pki, peers):
    """Over mutual TLS a device reaches the coordinator, but cannot write as another device or command one."""
    url = f"mqtts://localhost:{tls_broker.port}"
    coord = peers(url, "coord", topics=("fl/v1/d/#",), **identity(pki, "coord")).up()
    dev1 = peers(url, "dev1", topics=("fl/v1/c/dev1/#", "fl/v1/b/#"), **identity(pki, "dev1")).up()
    dev2 = peers(url, "dev2", topics=("fl/v1/c/dev2/#", "fl/v1/b/#"), **identity(pki, "dev2")).up()
    for topic in ("fl/v1/d/dev2/message", "fl/v1/c/dev2/message", "fl/v1/b/coordinator"):
        answers = []
        run_until(loop, lambda: dev1.link.is_up)
        downs = len(dev1.downs)
        dev1.link.publish(topic, b"not mine to say", on_sent=lambda answers=answers: answers.append(1))
        # mosquitto 2.0.11 acknowledges the denied message with a reason, and over TLS often ends the connection.
        run_until(loop, lambda answers=answers, downs=downs: answers or len(dev1.downs) > downs)
    while not coord.got:
        run_until(loop, lambda: dev1.link.is_up)
        downs = len(dev1.downs)
        dev1.link.publish("fl/v1/d/dev1/chunk", bytes(90_000))
        run_until(loop, lambda downs=downs: coord.got or len(dev1.downs) > downs)
    coord.link.publish("fl/v1/c/dev2/message", b"command")
    run_until(loop, lambda: dev2.got)
    assert {(topic, len(payload)) for topic, payload in coord.got} == {("fl/v1/d/dev1/chunk", 90_000)}
    assert dev2.got == [("fl/v1/c/dev2/message", b"command")]
    assert dev1.got == []


def test_server_of_an_unknown_authority_is_refused(loop, tls_broker, pki, peers, tmp_path):
    """A broker whose certificate another authority signed is not trusted, and the reason names the certificate."""
    make_pki(tmp_path / "other")
    peer = peers(
        f"mqtts://localhost:{tls_broker.port}", **(identity(pki, "dev1") | {"ca_file": f"{tmp_path}/other/ca.crt"})
    )
    peer.link.start()
    run_until(loop, lambda: peer.downs)
    assert "certificate verify failed" in peer.downs[0].lower()
    assert peer.ups == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ca_file": "/nowhere/ca.crt"}, r"CA file /nowhere/ca\.crt cannot be used \(No such file.*name the PEM file"),
        ({"ca_file": "{pki}/dev1.key"}, r"CA file .*dev1\.key cannot be used"),
        ({"certificate_file": "/nowhere/dev.crt"}, r"certificate /nowhere/dev\.crt and key .*cannot be used"),
        ({"key_file": "/nowhere/dev.key"}, r"key /nowhere/dev\.key cannot be used"),
        ({"key_file": "{pki}/dev2.key"}, r"dev2\.key cannot be used \(KEY_VALUES_MISMATCH\); .*of one pair"),
        ({"key_file": "{pki}/locked.key"}, r"locked\.key cannot be used .*without a passphrase"),
        ({"certificate_file": None}, r"key .*dev1\.key without a certificate"),
    ],
)
def test_unusable_certificate_files_are_refused_at_the_start(loop, pki, wrong, said):
    """A missing, damaged, locked or foreign file for TLS is an error with the file's name and the cure, not a retry."""
    if "locked" in str(wrong) and not (pki / "locked.key").exists():
        command = ["openssl", "ec", "-in", "dev1.key", "-aes128", "-passout", "pass:word", "-out", "locked.key"]
        subprocess.run(command, cwd=pki, check=True, capture_output=True)
    files = {key: name and name.format(pki=pki) for key, name in (identity(pki, "dev1") | wrong).items()}
    with pytest.raises(ConfigError, match=said):
        Peer(loop, "mqtts://localhost:1", **files)


def test_certificate_file_that_vanishes_later_is_tried_again(loop, tls_broker, tmp_path, peers):
    """A file that is replaced while the link runs is named in the reason, and read again at the next attempt."""
    folder = tmp_path / "own"
    make_pki(folder, "dev1")
    peer = peers(f"mqtts://localhost:{tls_broker.port}", **identity(folder, "dev1"))
    (folder / "ca.crt").rename(folder / "away.crt")
    peer.link.start()
    run_until(loop, lambda: peer.downs)
    assert f"CA file {folder}/ca.crt cannot be used" in peer.downs[0]
    (folder / "away.crt").rename(folder / "ca.crt")
    run_until(loop, lambda: "CA file" not in peer.downs[-1])  # the test's broker has another authority


def test_reason_of_the_broker_is_told(loop, broker, peers):
    """An MQTT 5 broker that ends the connection says why, and the reason is passed on."""
    peer = peers(broker.url).up()
    flags = DisconnectFlags(is_disconnect_packet_from_server=True)
    reason = ReasonCode(PacketTypes.DISCONNECT, "Session taken over")
    peer.link._disconnected(peer.link._client, None, flags, reason, None)
    run_until(loop, lambda: peer.downs)
    assert peer.downs == ["the broker ended it: Session taken over"]


def test_refused_messages_are_told_once(loop, mosquitto_program, tmp_path, peers, caplog):
    """Where the broker refuses what a client publishes, MQTT 5 says so and the log names the cure, once."""
    (tmp_path / "acl").write_text("pattern write d/%c/#\n")
    lines = ["allow_anonymous true", f"acl_file {tmp_path}/acl"]
    with own_mosquitto(mosquitto_program, tmp_path, *lines) as broker:
        peer = peers(broker.url, "dev").up()
        said = []
        peer.when_up = lambda: said.append(peer.link.publish("d/other/state", b"x"))
        peer.when_up()
        run_until(loop, lambda: "refuses" in caplog.text)
        peer.link._drop("again")
        run_until(loop, lambda: len(said) == 2)
        for _ in range(10):
            loop.step(0.02)
    assert caplog.text.count("the broker refuses messages of 'dev': Not authorized; its certificate") == 1


def test_client_without_a_certificate_is_refused(loop, tls_broker, pki, peers):
    """The broker lets nobody in who has no certificate."""
    peer = peers(f"mqtts://localhost:{tls_broker.port}", ca_file=f"{pki}/ca.crt")
    peer.link.start()
    run_until(loop, lambda: len(peer.downs) >= 2)
    assert peer.ups == 0


def test_stop_inside_a_message_is_safe(loop, broker, peers):
    """A link may be stopped from its own callback."""
    peer = peers(broker.url)
    peer.handler = lambda *_: peer.link.stop()
    peer.up()
    for _ in range(5):
        peer.link.publish("t/x", bytes(1000))
    run_until(loop, lambda: not peer.link.is_up)
    loop.step(0.05)
    assert isinstance(peer.link, Link)
    assert peer.downs == []
