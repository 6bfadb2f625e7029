"""The link protects its own memory from giants."""

from __future__ import annotations

from random import Random

from edge_runtime.transport.link import PACKET_LIMIT_BYTES, Link, LinkSettings
from edge_runtime.transport.loop import Loop
from tests.support.brokers import OwnMosquitto


def test_a_broker_keeps_giant_packets_from_the_link(mosquitto_program, tmp_path):
    """A message over the link's limit never reaches it, the next one does; the broker itself has no limit."""
    from paho.mqtt.client import MQTTv5
    from paho.mqtt.publish import multiple

    broker = OwnMosquitto(mosquitto_program, tmp_path, ["allow_anonymous true"])
    broker.start()
    loop, got = Loop(), []

    def publish() -> None:
        packets = [("t", b"x" * (PACKET_LIMIT_BYTES + 1), 1, False), ("t", b"small", 1, False)]
        multiple(packets, hostname="127.0.0.1", port=broker.port, protocol=MQTTv5)

    def on_message(_topic: str, payload: bytes) -> None:
        got.append(len(payload))
        loop.stop()

    link = Link(
        LinkSettings(url=broker.url, client_id="small"),
        loop,
        topics=["t"],
        on_message=on_message,
        on_up=publish,
        on_down=lambda _reason: None,
        random=Random(1),
    )
    try:
        loop.call_later(10, loop.stop)
        link.start()
        loop.run()
    finally:
        link.stop()
        loop.close()
        broker.kill()
    assert got == [len(b"small")]
