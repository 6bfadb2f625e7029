"""What smart plugs say over MQTT: topics to hear, questions to ask, and their texts as watts and joules.

Tasmota: ``ENERGY`` in ``tele/TOPIC/SENSOR`` and ``stat/TOPIC/STATUS10``, kWh; lists where a device has more than one
channel. Shelly Gen1: plain numbers, watt-minutes. Shelly Gen2 and later: JSON, watt-hours; notifications hold only what
changed. See the makers' MQTT pages.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NamedTuple, TypeAlias

from energy.errors import SensorError

Kind: TypeAlias = Literal["tasmota", "shelly1", "shelly2"]
KINDS: tuple[Kind, ...] = ("tasmota", "shelly1", "shelly2")

JOULES_PER_KWH = 3.6e6
JOULES_PER_WH = 3600.0
JOULES_PER_WATT_MINUTE = 60.0


class Said(NamedTuple):
    """What one message tells; None: nothing about it."""

    watts: float | None = None
    joules: float | None = None


class Question(NamedTuple):
    """What to publish to be told the present state; ``payload`` may be empty."""

    topic: str
    payload: str


class Dialect(NamedTuple):
    """How one plug talks.

    Attributes:
        topics: to subscribe.
        question: to poll with; None: the plug speaks on its own only.
        resolution_watts: step of its power reading.
    """

    kind: Kind
    topic: str
    channel: int
    topics: tuple[str, ...]
    question: Question | None
    resolution_watts: float


def dialect(kind: Kind, topic: str, channel: int = 0, client_id: str = "edge-energy") -> Dialect:
    """The dialect of a plug: ``topic`` as its settings call it, ``channel`` from 0."""
    if kind == "tasmota":
        topics: tuple[str, ...] = (f"tele/{topic}/SENSOR", f"stat/{topic}/STATUS10")
        return Dialect(kind, topic, channel, topics, Question(f"cmnd/{topic}/Status", "10"), 1.0)
    if kind == "shelly1":
        base = topic if topic.startswith("shellies/") else f"shellies/{topic}"
        topics = tuple(f"{base}/{part}/{channel}/{what}" for part in ("relay", "emeter") for what in _GEN1)
        return Dialect(kind, base, channel, topics, Question(f"{base}/command", "update"), 0.01)
    answers = f"{client_id}/plug"
    statuses = (f"{topic}/status/{name}" for name in _gen2_names(channel))
    topics = (f"{topic}/events/rpc", *statuses, f"{answers}/rpc")
    ask = {"id": 1, "src": answers, "method": "Shelly.GetStatus"}  # knows relays and bare meters alike
    return Dialect(kind, topic, channel, topics, Question(f"{topic}/rpc", json.dumps(ask)), 0.1)


_GEN1 = ("power", "energy", "total")


def _gen2_names(channel: int) -> tuple[str, str]:
    return f"switch:{channel}", f"pm1:{channel}"


def parse(speech: Dialect, topic: str, payload: bytes) -> Said:
    """What a message says about power and energy of the dialect's channel; nothing if it is about something else.

    Raises:
        SensorError: ``implausible``: a number that is none; ``unsupported``: the channel does not exist.
    """
    if speech.kind == "shelly1":
        return _gen1(speech, topic, payload)
    try:
        message = json.loads(payload)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise SensorError("implausible", f"plug {speech.topic}: {topic} holds no JSON ({error})") from error
    if not isinstance(message, dict):
        return Said()
    return _tasmota(speech, message) if speech.kind == "tasmota" else _gen2(speech, message)


def _tasmota(speech: Dialect, message: dict[str, Any]) -> Said:
    inner = message.get("StatusSNS")
    energy = (inner if isinstance(inner, dict) else message).get("ENERGY")
    if not isinstance(energy, dict):
        return Said()
    total = _channel(speech, energy.get("Total"))
    return Said(
        _number(speech, "Power", _channel(speech, energy.get("Power"))),
        _scaled(_number(speech, "Total", total), JOULES_PER_KWH),
    )


def _channel(speech: Dialect, value: Any) -> Any:
    if not isinstance(value, list):
        if speech.channel and value is not None:
            raise SensorError("unsupported", f"plug {speech.topic}: has one channel only; leave the channel out")
        return value
    if speech.channel >= len(value):
        message = f"plug {speech.topic}: has channels 0 to {len(value) - 1}, not {speech.channel}; choose one of them"
        raise SensorError("unsupported", message)
    return value[speech.channel]


def _gen1(speech: Dialect, topic: str, payload: bytes) -> Said:
    what = topic.rsplit("/", 1)[-1]
    if what not in _GEN1:
        return Said()
    if what == "energy" and "/emeter/" in topic:
        return Said()  # of the meters this is what came since the last message; their count is "total"
    value = _number(speech, what, payload.decode("ascii", errors="replace"))
    if what == "power":
        return Said(watts=value)
    return Said(joules=_scaled(value, JOULES_PER_WH if what == "total" else JOULES_PER_WATT_MINUTE))


def _gen2(speech: Dialect, message: dict[str, Any]) -> Said:
    found = message
    for key in ("params", "result"):  # a notification, or the answer to a question
        if isinstance(message.get(key), dict):
            found = message[key]
    if "error" in message:
        error = message["error"]
        text = error.get("message", error) if isinstance(error, dict) else error
        raise SensorError("unsupported", f"plug {speech.topic}: {text}; check kind and channel")
    components = [found[name] for name in _gen2_names(speech.channel) if isinstance(found.get(name), dict)]
    if components:
        found = components[0]
    elif "result" in message:
        there = sorted(name for name in found if name.startswith(("switch:", "pm1:")))
        text = f"plug {speech.topic}: has no channel {speech.channel}; it has {', '.join(there) or 'none that meters'}"
        raise SensorError("unsupported", text)
    elif "params" in message:
        return Said()  # of another channel
    energy = found.get("aenergy")
    total = energy.get("total") if isinstance(energy, dict) else None
    return Said(
        _number(speech, "apower", found.get("apower")), _scaled(_number(speech, "aenergy.total", total), JOULES_PER_WH)
    )


def _number(speech: Dialect, name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise SensorError("implausible", f"plug {speech.topic}: {name} is {str(value)[:40]!r}, no number") from error
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise SensorError("implausible", f"plug {speech.topic}: {name} is {value!r}")
    return number


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
