"""A smart plug that reports over MQTT: what the whole device draws from the wall, once a second at best.

The plug's power is integrated; its own counter is read beside it and has to agree, but is too coarse to stand alone (a
watt-hour is 3600 J). Nothing is discovered: the owner names broker, kind and topic.
"""

from __future__ import annotations

import ssl
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from energy.errors import SensorError
from energy.sensors.base import Domain, Rail, Source
from energy.sensors.plug_parser import Dialect, Kind, Said, dialect, parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from urllib.parse import SplitResult

NAME = "plug"
INTERVAL_S = 1.0
WAIT_S = 5.0  # for the first answer
PAUSE_WAIT_S = 2.0  # for a fresh one when nobody read for a while
STALE_S = 15.0
STALE_UNASKED_S = 90.0  # Gen1 speaks every 30 s when nothing changes
LIMIT_WATTS = 4000.0  # a European socket carries 16 A


class PlugSettings(NamedTuple):
    """How to reach a plug.

    ``broker``: ``mqtt://host[:port]`` or ``mqtts://``. ``topic``: as in the plug's own settings (Tasmota ``Topic``,
    Shelly device id or MQTT prefix). ``password_file``: its first line is the password.
    """

    broker: str
    kind: Kind
    topic: str
    channel: int = 0
    user: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None


class Plug:
    """Listens in a thread of paho-mqtt, and asks the plug at every reading.

    Args:
        settings: of the plug.
        wait_s: how long to wait for the first answer.
        clock: monotonic seconds.
        connect: False leaves connecting to the first reading, so that nothing is waited for here; ``rails`` are those
            of the plug from then on.

    Raises:
        SensorError: the broker or the plug does not answer, refuses, or the settings cannot be used.
    """

    slow = True

    def __init__(
        self,
        settings: PlugSettings,
        *,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        connect: bool = True,
    ) -> None:
        self._client_id = f"edge-energy-{uuid.uuid4().hex[:8]}"
        self._speech: Dialect = dialect(settings.kind, settings.topic, settings.channel, self._client_id)
        self._settings = settings
        self._clock = clock
        self._wait_s = wait_s
        self._news = threading.Condition()
        self._watts: float | None = None
        self._joules: float | None = None
        self._heard_s = self._read_s = clock()
        self._heard = 0
        self._error: SensorError | None = None
        self._broker = settings.broker
        self._refused = ""
        self._client: Any = None
        _address(settings)
        where = f"everything behind the plug {settings.topic}, its power supply included"
        self.source = Source(NAME, "board", "coarse", where)
        self.domain: Domain = "system"
        self.interval_s = INTERVAL_S
        power = Rail(NAME, "board", "watts", limit_watts=LIMIT_WATTS, resolution=self._speech.resolution_watts)
        self.rails: tuple[Rail, ...] = (power,)
        if connect:
            self._open()

    @property
    def connected(self) -> bool:
        """Whether the plug answered once and is listened to."""
        return self._client is not None

    def read(self) -> tuple[float, ...]:
        """Watts, and joules if the plug counts them; see :class:`energy.sensors.base.Sensor`.

        Raises:
            SensorError: ``frozen``: nothing was heard for too long; else what the last message was about.
        """
        if self._client is None:
            self._open()
        now_s = self._clock()
        paused = now_s - self._read_s > 3 * INTERVAL_S
        self._read_s = now_s
        if paused:
            self._ask_and_wait(min(self._wait_s, PAUSE_WAIT_S))
        else:
            self._ask()
        with self._news:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            silent_s = self._clock() - self._heard_s
            limit_s = STALE_UNASKED_S if self._speech.kind == "shelly1" else STALE_S
            if silent_s > limit_s or self._watts is None:
                raise SensorError("frozen", f"{self._named()} has said nothing for {silent_s:.0f} s; {self._cure()}")
            return (self._watts,) if len(self.rails) == 1 else (self._watts, self._joules or 0.0)

    def close(self) -> None:
        """Leaves the broker."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def _open(self) -> None:
        """Connects and waits for the first answer; what fails is closed again, so that it may be tried once more."""
        self._error, self._refused = None, ""
        self._client = self._connect(self._settings, self._client_id)
        self._client.loop_start()
        try:
            self._ask_and_wait(self._wait_s)
        except SensorError:
            self.close()
            raise
        self._read_s = self._clock()
        if self._joules is not None and len(self.rails) == 1:
            counter = Rail(f"{NAME} counter", "board", "joules", in_total=False, limit_watts=LIMIT_WATTS)
            self.rails = (*self.rails, counter)

    def _connect(self, settings: PlugSettings, client_id: str) -> Any:
        try:
            from paho.mqtt import client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise SensorError("unsupported", f"{NAME}: paho-mqtt is missing; pip install paho-mqtt") from error
        address = _address(settings)
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id)
        try:
            if settings.user is not None:
                client.username_pw_set(settings.user, _password(settings.password_file))
            if address.scheme == "mqtts":
                client.tls_set_context(ssl.create_default_context(cafile=settings.ca_file))
            client.on_connect = self._on_connect
            client.on_message = self._on_message
            client.reconnect_delay_set(1, 30)
            client.connect_timeout = self._wait_s
            client.connect(address.hostname or "", address.port or (8883 if address.scheme == "mqtts" else 1883))
        except (OSError, ValueError) as error:
            raise SensorError("absent", f"{NAME}: broker {settings.broker}: {error}; check address and port") from error
        return client

    def _on_connect(self, client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            with self._news:
                self._refused = str(reason)
                self._news.notify_all()
            return
        self._refused = ""
        client.subscribe([(topic, 0) for topic in self._speech.topics])
        self._ask()

    def _on_message(self, _client: Any, _data: Any, message: Any) -> None:
        try:
            said = parse(self._speech, message.topic, message.payload)
        except SensorError as error:
            with self._news:
                self._error = error
                self._news.notify_all()
            return
        self._hear(said)

    def _hear(self, said: Said) -> None:
        if said == Said():
            return
        with self._news:
            self._joules = self._joules if said.joules is None else said.joules
            if said.watts is not None:
                self._watts = said.watts
                self._heard_s = self._clock()
                self._heard += 1
            self._news.notify_all()

    def _ask(self) -> None:
        question = self._speech.question
        if question is not None:
            self._client.publish(question.topic, question.payload)  # QoS 0: unanswered questions are asked again

    def _ask_and_wait(self, wait_s: float) -> None:
        heard = self._heard if self._watts is not None else 0
        self._ask()
        with self._news:
            self._news.wait_for(lambda: self._heard > heard or self._refused or self._error, timeout=wait_s)
            if self._refused:
                raise SensorError(
                    "permission", f"{NAME}: broker {self._broker}: {self._refused}; check user and password"
                )
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._heard == heard and self._watts is None:
                raise SensorError("absent", f"{self._named()} does not answer; {self._cure()}")
        if self._joules is None and self._speech.kind == "shelly1":  # it says power and energy in two messages
            with self._news:
                self._news.wait_for(lambda: self._joules is not None, timeout=0.5)

    def _named(self) -> str:
        return f"{NAME} {self._speech.topic} at {self._broker}"

    def _cure(self) -> str:
        return f"check that it is on, uses this broker, and is of kind {self._speech.kind}"


def _address(settings: PlugSettings) -> SplitResult:
    try:
        address = urlsplit(settings.broker)
        usable = address.scheme in ("mqtt", "mqtts") and address.hostname and address.port != 0
    except ValueError:  # the port is no number, or the host no address
        usable = None
    if not usable:
        raise SensorError("absent", f"{NAME}: broker {settings.broker!r} is no address; write mqtt://host:1883")
    return address


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise SensorError("absent", f"{NAME}: password file {path} cannot be used ({error})") from error
