"""Smart plugs: what they say, and a real broker between."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from energy.errors import SensorError
from energy.metering.meter import Meter
from energy.sensors.background import wrapped
from energy.sensors.plug import Plug, PlugSettings
from energy.sensors.plug_parser import Said, dialect, parse
from tests.energy.meter_tools import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.brokers import OwnMosquitto

ONE = {"Time": "2024-01-01T00:00:00", "ENERGY": {"Total": 1.25, "Power": 7, "Voltage": 231}}
TWO = {"ENERGY": {"Total": [2.5, 0.5], "Power": [40, 3], "Voltage": 231}}


@pytest.mark.parametrize(
    ("kind", "channel", "topic", "payload", "said"),
    [
        ("tasmota", 0, "tele/desk/SENSOR", ONE, Said(7.0, 4.5e6)),
        ("tasmota", 0, "stat/desk/STATUS10", {"StatusSNS": ONE}, Said(7.0, 4.5e6)),
        ("tasmota", 1, "tele/desk/SENSOR", TWO, Said(3.0, 1.8e6)),
        ("tasmota", 0, "tele/desk/SENSOR", {"AM2301": {"Temperature": 20.5}}, Said()),
        ("tasmota", 0, "tele/desk/SENSOR", [1, 2], Said()),
        ("shelly1", 0, "shellies/desk/relay/0/power", b"20.5", Said(watts=20.5)),
        ("shelly1", 0, "shellies/desk/relay/0/energy", b"1000", Said(joules=60_000.0)),
        ("shelly1", 1, "shellies/desk/emeter/1/total", b"2.5", Said(joules=9000.0)),
        ("shelly1", 1, "shellies/desk/emeter/1/energy", b"2.5", Said()),
        ("shelly2", 0, "desk/status/switch:0", {"id": 0, "apower": 4.5, "aenergy": {"total": 2.0}}, Said(4.5, 7200.0)),
        (
            "shelly2",
            0,
            "desk/events/rpc",
            {"method": "NotifyStatus", "params": {"switch:0": {"apower": 9.5}}},
            Said(9.5),
        ),
        ("shelly2", 0, "desk/events/rpc", {"params": {"ts": 1.5, "switch:0": {"voltage": 230.5}}}, Said()),
        ("shelly2", 0, "desk/events/rpc", {"params": {"switch:1": {"apower": 9.5}}}, Said()),
        ("shelly2", 0, "x/rpc", {"id": 1, "result": {"pm1:0": {"id": 0, "apower": 3.5}, "sys": {}}}, Said(3.5)),
    ],
)
def test_every_dialect_becomes_watts_and_joules(kind, channel, topic, payload, said) -> None:
    """kWh, Wh and watt-minutes become joules; what a message does not tell stays unknown."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    assert parse(dialect(kind, "desk", channel), topic, data) == said


@pytest.mark.parametrize(
    ("kind", "channel", "payload", "fault"),
    [
        ("tasmota", 0, b"\xff{", "implausible"),
        ("tasmota", 0, b"[" * 100_000, "implausible"),
        ("tasmota", 0, json.dumps({"ENERGY": {"Power": "much"}}).encode(), "implausible"),
        ("tasmota", 0, b'{"ENERGY": {"Power": NaN}}', "implausible"),
        ("tasmota", 0, json.dumps({"ENERGY": {"Power": -3}}).encode(), "implausible"),
        ("tasmota", 2, json.dumps(TWO).encode(), "unsupported"),
        ("tasmota", 1, json.dumps(ONE).encode(), "unsupported"),
        ("shelly2", 3, json.dumps({"result": {"switch:0": {"apower": 1}}}).encode(), "unsupported"),
        ("shelly2", 0, json.dumps({"error": {"code": 404, "message": "No handler"}}).encode(), "unsupported"),
    ],
)
def test_nonsense_is_named(kind, channel, payload: bytes, fault: str) -> None:
    """Broken JSON, wrong numbers and channels that do not exist are faults, never zeros."""
    with pytest.raises(SensorError, match="desk") as raised:
        parse(dialect(kind, "desk", channel), "tele/desk/SENSOR", payload)
    assert raised.value.fault == fault


class FakePlug:
    """A device at a real broker that answers questions as its firmware would."""

    def __init__(self, url: str, topic: str, answer: Callable[[bytes], list[tuple[str, object]]]) -> None:
        self.on = True
        self.asked = 0
        self._answer = answer
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self.client.on_message = self._on_message
        subscribed: list[int] = []
        self.client.on_connect = lambda *_: self.client.subscribe(topic)
        self.client.on_subscribe = lambda *_: subscribed.append(1)
        self.client.connect("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.client.loop_start()
        while not subscribed:
            time.sleep(0.01)

    def _on_message(self, _client, _data, message) -> None:
        self.asked += 1
        for topic, payload in self._answer(message.payload) if self.on else ():
            self.client.publish(topic, payload if isinstance(payload, str) else json.dumps(payload))

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def broker(mosquitto_program: str, tmp_path: Path) -> Iterator[OwnMosquitto]:
    """An open mosquitto of the test's own."""
    from tests.support.brokers import own_mosquitto

    with own_mosquitto(mosquitto_program, tmp_path) as running:
        yield running


def gen2(payload: bytes) -> list[tuple[str, object]]:
    asked = json.loads(payload)
    state = {"switch:0": {"id": 0, "apower": 12.5, "aenergy": {"total": 10.0}}}
    return [(f"{asked['src']}/rpc", {"id": asked["id"], "src": "desk", "result": state})]


@pytest.mark.mosquitto
@pytest.mark.parametrize(
    ("kind", "question", "answer", "values"),
    [
        ("tasmota", "cmnd/desk/Status", lambda _: [("stat/desk/STATUS10", {"StatusSNS": ONE})], (7.0, 4.5e6)),
        ("shelly2", "desk/rpc", gen2, (12.5, 36_000.0)),
        (
            "shelly1",
            "shellies/desk/command",
            lambda _: [("shellies/desk/relay/0/power", "20.5"), ("shellies/desk/relay/0/energy", "1000")],
            (20.5, 60_000.0),
        ),
    ],
)
def test_plug_at_a_real_broker(broker: OwnMosquitto, kind, question: str, answer, values: tuple[float, ...]) -> None:
    """A plug is asked, answers, and is a sensor of the whole board with its own counter beside."""
    device = FakePlug(broker.url, question, answer)
    plug = Plug(PlugSettings(broker.url, kind, "desk"))
    assert plug.read() == pytest.approx(values)
    assert [rail.in_total for rail in plug.rails] == [True, False]
    assert (plug.source.scope, plug.source.quality, plug.domain) == ("board", "coarse", "system")
    plug.close()
    device.stop()


@pytest.mark.mosquitto
def test_plug_that_falls_silent_is_frozen(broker: OwnMosquitto) -> None:
    """Old numbers are not read again and again; after a pause the plug is asked afresh."""
    clock = Clock()
    device = FakePlug(broker.url, "cmnd/desk/Status", lambda _: [("stat/desk/STATUS10", {"StatusSNS": ONE})])
    plug = Plug(PlugSettings(broker.url, "tasmota", "desk"), wait_s=1.0, clock=clock)
    meter = Meter([[plug]], clock=clock)
    clock.now += 3600.0  # the program did something else
    assert plug.read()[0] == 7.0
    device.on = False
    time.sleep(0.1)  # answers under way arrive
    for _ in range(20):
        clock.now += 1.0
        meter.sample()
    assert meter.source is None
    with pytest.raises(SensorError, match="said nothing for") as raised:
        plug.read()
    assert raised.value.fault == "frozen"
    meter.close()
    device.stop()


@pytest.mark.mosquitto
def test_a_plug_in_the_background_keeps_nobody_waiting(broker: OwnMosquitto) -> None:
    """An agent starts without its plug; as soon as it answers, joules are the plug's, with its counter beside them."""
    settings = PlugSettings(broker.url, "tasmota", "desk")
    plug = Plug(settings, connect=False, wait_s=0.3)
    assert not plug.connected
    ways = wrapped([(plug,)])
    meter = Meter(ways)
    assert meter.source is None
    device = FakePlug(broker.url, "cmnd/desk/Status", lambda _: [("stat/desk/STATUS10", {"StatusSNS": ONE})])
    for _ in range(500):
        meter._retry_s = [0.0]  # no need to wait so long here
        meter.sample()
        if meter.source is not None:
            break
        time.sleep(0.02)
    assert meter.source is not None
    assert list(meter.rail_watts) == ["plug", "plug counter"]
    assert meter.watts == 7.0
    meter.close()
    device.stop()
    with pytest.raises(SensorError, match="no address"):
        Plug(PlugSettings("http://127.0.0.1", "tasmota", "desk"), connect=False)


@pytest.mark.mosquitto
def test_absent_plug_broker_and_wrong_settings_are_told_apart(broker: OwnMosquitto, tmp_path: Path) -> None:
    """No plug, no broker, no address and no password file each say what to check."""
    from tests.support.brokers import free_port

    def open_plug(url: str, **options) -> None:
        Plug(PlugSettings(url, "tasmota", "nowhere", **options), wait_s=0.2)

    with pytest.raises(SensorError, match=r"nowhere .* does not answer"):
        open_plug(broker.url)
    with pytest.raises(SensorError, match="check address and port"):
        open_plug(f"mqtt://127.0.0.1:{free_port()}")
    with pytest.raises(SensorError, match="mqtt://host"):
        open_plug("http://127.0.0.1")
    with pytest.raises(SensorError, match="password file"):
        open_plug(broker.url, user="me", password_file=tmp_path / "none")


@pytest.mark.mosquitto
def test_wrong_password_is_refused_by_the_broker(mosquitto_program: str, tmp_path: Path) -> None:
    """A broker that does not let us in is a matter of permission."""
    from tests.support.brokers import own_mosquitto

    (tmp_path / "secret").write_text("wrong\n")
    with own_mosquitto(mosquitto_program, tmp_path, "allow_anonymous false") as closed:
        settings = PlugSettings(closed.url, "tasmota", "desk", user="me", password_file=tmp_path / "secret")
        with pytest.raises(SensorError, match="check user and password") as raised:
            Plug(settings)
    assert raised.value.fault == "permission"
