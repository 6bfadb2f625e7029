"""One MQTT connection with automatic reconnection, over paho-mqtt 2 and the event loop.

A link promises little, so that nothing hidden is lost: it says when it is up (subscribed) and down, publishes at QoS 1
while it is up, and forgets everything in flight when the connection ends. Whoever sends anything that matters sends
it again after the next ``on_up``; a PUBACK only says that the broker has a message, never that the peer has it.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec

from edge_runtime.errors import ConfigError, MessageError
from edge_runtime.transport.loop import READ, WRITE, Loop, Timer
from edge_runtime.transport.paho import (
    CallbackAPIVersion,
    Client,
    MQTTErrorCode,
    MQTTProtocolVersion,
    PacketTypes,
    Properties,
)
from edge_runtime.transport.paho import client as paho

if TYPE_CHECKING:
    from random import Random

log = logging.getLogger("edge.link")

PACKET_LIMIT_BYTES = 128 * 1024  # the smallest limit of a cloud broker in use; brokers that say less are obeyed
CHUNK_BYTES = 96 * 1024
CONNECT_TIMEOUT_S = 10.0  # TCP and TLS
ANSWER_TIMEOUT_S = 5.0  # CONNACK and SUBACK; some 3.1.1-only brokers never answer an MQTT 5 client
READ_S = 0.02  # then it is the turn of timers, and of what is to be written
PATIENT_ATTEMPTS = 6  # within about ten seconds
STABLE_S = 20.0  # a connection that lived this long resets the back-off
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def packet_bytes(topic: str, payload_bytes: int) -> int:
    """Size of the MQTT 5 packet that carries a payload at QoS 1: header, topic, packet id, no properties."""
    rest = 2 + len(topic) + 2 + 1 + payload_bytes
    return 1 + (rest > 127) + (rest > 16383) + (rest > 2097151) + 1 + rest


class LinkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the broker. ``password`` is called at every attempt, so that a new secret is picked up."""

    url: str
    client_id: str
    username: str | None = None
    password: Callable[[], str | None] | None = None
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    insecure: bool = False
    keepalive_s: int = 60
    backoff_first_s: float = 0.2
    backoff_limit_s: float = 30.0
    protocol: Literal["auto", "5", "3.1.1"] = "auto"


class Address(msgspec.Struct, frozen=True):
    """Host, port and whether TLS is used."""

    host: str
    port: int
    tls: bool


def parse_url(url: str, *, insecure: bool = False) -> Address:
    """Host, port and TLS of ``mqtt://`` or ``mqtts://``.

    Raises:
        ConfigError: another scheme, no host, or plain MQTT to another host without ``insecure``.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker URL {url!r} is malformed ({error})") from error
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise ConfigError(f"broker URL {url!r} is malformed: write mqtts://HOST:PORT, or mqtt://localhost:PORT")
    tls = parts.scheme == "mqtts"
    if not tls and parts.hostname not in LOOPBACK and not insecure:
        raise ConfigError(f"broker URL {url!r} would send models unencrypted; use mqtts://, or allow it with insecure")
    return Address(parts.hostname, port or (8883 if tls else 1883), tls)


def check_tls(settings: LinkSettings) -> None:
    """Reads the files for TLS once, so that a wrong one is told at the start and not at every attempt.

    Raises:
        ConfigError: one is missing, damaged, or certificate and key do not belong together.
    """
    if settings.key_file and not settings.certificate_file:
        raise ConfigError(f"key {settings.key_file} without a certificate; name its certificate too")
    if settings.url.startswith("mqtts:"):
        try:
            _tls_context(settings)
        except OSError as error:
            raise ConfigError(str(error)) from error


def _tls_context(settings: LinkSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        cure = "name the PEM file of the authority that signed the broker's certificate"
        raise OSError(f"CA file {settings.ca_file} cannot be used ({_said(error)}); {cure}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certificate_file:
        try:  # without a password OpenSSL would ask for one on the terminal
            context.load_cert_chain(settings.certificate_file, settings.key_file, password="")
        except OSError as error:
            files = f"{settings.certificate_file} and key {settings.key_file or settings.certificate_file}"
            cure = "both must be PEM files, readable, of one pair, the key without a passphrase"
            raise OSError(f"certificate {files} cannot be used ({_said(error)}); {cure}") from error
    return context


def _said(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or str(error)


class Link:
    """A client of one broker. All callbacks run in the loop's thread.

    Raises:
        ConfigError: the URL or a file for TLS cannot be used.

    Args:
        settings: where and as whom to connect.
        loop: the event loop that drives it.
        topics: subscribed (QoS 1) at every connection, before ``on_up``.
        newest_only: subscribed at QoS 0: of these the next message makes up for a lost one, and none is acknowledged.
        on_message: called with (topic, payload).
        on_up: the connection stands and the topics are subscribed.
        on_down: the connection ended, with the reason.
        will: topic and function giving the retained last will's payload, asked at every attempt.
        random: jitter of the reconnect back-off.
    """

    def __init__(
        self,
        settings: LinkSettings,
        loop: Loop,
        *,
        topics: list[str],
        on_message: Callable[[str, bytes], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        random: Random,
        will: tuple[str, Callable[[], bytes]] | None = None,
        newest_only: Sequence[str] = (),
    ) -> None:
        self.address = parse_url(settings.url, insecure=settings.insecure)
        check_tls(settings)
        self.is_up = False
        self.max_packet_bytes = PACKET_LIMIT_BYTES
        self.sent_bytes = 0
        self.received_bytes = 0
        self.rapid_losses = 0  # connections in a row that ended soon after they stood
        self._settings = settings
        self._loop = loop
        self._topics = [*((topic, 1) for topic in topics), *((topic, 0) for topic in newest_only)]
        self._on_message, self._on_up, self._on_down = on_message, on_up, on_down
        self._will = will
        self._random = random
        self._client: Client | None = None
        self._fd = -1
        self._attempt = 0
        self._up_at = 0.0
        self._protocol = MQTTProtocolVersion.MQTTv311 if settings.protocol == "3.1.1" else MQTTProtocolVersion.MQTTv5
        self._inflight = 20
        self._answered = False  # by a CONNACK that does not refuse our protocol version
        self._five_works = False  # known for the life of this link: a broker that dies in between is no older broker
        self._reached = False
        self._timers: list[Timer] = []
        self._acks: dict[int, Callable[[], None]] = {}
        self._started = self._receiving = False
        self._refusal_told = False

    @property
    def chunk_bytes(self) -> int:
        """Size of chunks that fit one packet of this broker, with room for topic and header."""
        limit = self.max_packet_bytes
        return min(CHUNK_BYTES, (limit - 4096) // 1024 * 1024) if limit >= 16_384 else max(64, limit // 2)

    @property
    def local_host(self) -> str | None:
        """This end's address of the connection; None while there is none."""
        sock = None if self._client is None else self._client.socket()
        try:
            return str(sock.getsockname()[0]) if isinstance(sock, socket.socket) else None
        except OSError:  # it ended just now
            return None

    def start(self) -> None:
        """Connects now and reconnects until :meth:`stop`."""
        self._started = True
        self._connect()

    def stop(self, farewell: tuple[str, bytes] | None = None) -> None:
        """Disconnects; ``farewell`` is published, retained, just before (a clean end sends no last will)."""
        self._started = False
        if self._receiving:  # paho holds its lock
            self._loop.call_soon(lambda: self.stop(farewell))
            return
        if self.is_up and self._client is not None:
            if farewell is not None:
                self._client.publish(farewell[0], farewell[1], qos=0, retain=True)
            self._client.disconnect()
            self._flush(self._client)
        self._drop("stopped", notify=False)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, on_sent: Callable[[], None] | None = None
    ) -> bool:
        """Publishes at QoS 1; False, and nothing sent, while the link is down. ``on_sent``: the broker has it.

        Raises:
            MessageError: the packet is over the broker's limit (which paho would answer with endless reconnects).
        """
        if not self.is_up or self._client is None:
            return False
        size = packet_bytes(topic, len(payload))
        if size > self.max_packet_bytes:
            raise MessageError(f"packet of {size} bytes for {topic} is over the broker's limit {self.max_packet_bytes}")
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_QUEUE_SIZE):
            return False  # the loss is noticed by the loop, which reports it with on_down
        self.sent_bytes += size
        if on_sent is not None:
            self._acks[info.mid] = on_sent
        return True

    def subscribe(self, topic: str) -> None:
        """Subscribes until the connection ends (QoS 1)."""
        if self.is_up and self._client is not None:
            self._client.subscribe(topic, qos=1)

    def unsubscribe(self, topic: str) -> None:
        """Ends a subscription."""
        if self.is_up and self._client is not None:
            self._client.unsubscribe(topic)

    @staticmethod
    def _flush(client: Client) -> None:
        """Writes what is queued, for one second at most."""
        for _ in range(20):
            sock = client.socket()
            if sock is None or not client.want_write():
                return
            select.select([], [sock], [], 0.05)
            client.loop_write()

    # Connecting

    def _connect(self) -> None:
        settings = self._settings
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=self._protocol,
            reconnect_on_failure=False,  # by itself it would try older protocols, blocking
        )
        client.max_queued_messages_set(0)
        client.max_inflight_messages_set(self._inflight)
        self._answered = False
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._will is not None:
            client.will_set(self._will[0], self._will[1](), qos=1, retain=True)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        client.on_publish = self._published
        client.on_disconnect = self._disconnected
        client.on_socket_open = self._socket_opened
        client.on_socket_close = self._socket_closed
        client.on_socket_register_write = self._socket_wants_write
        client.on_socket_unregister_write = self._socket_wrote
        self._client = client
        self._timers = []
        try:
            password = None if settings.username is None or settings.password is None else settings.password()
        except FileNotFoundError as error:
            self._drop(f"the password file {error.filename} is not there yet: is the server up?", patient=True)
            return
        except (OSError, ValueError) as error:
            self._drop(f"the password file cannot be read: {error}")
            return
        try:
            if settings.username is not None:
                client.username_pw_set(settings.username, password)
            if self.address.tls:
                client.tls_set_context(_tls_context(settings))
            client.connect(
                self.address.host, self.address.port, keepalive=settings.keepalive_s, properties=self._properties()
            )
        except (OSError, ValueError) as error:
            self._drop(f"cannot connect to {settings.url}: {error}")
            return
        self._timers = [self._loop.call_later(ANSWER_TIMEOUT_S, lambda: self._drop("the broker did not answer"))]

    def _properties(self) -> Properties | None:
        """Tells an MQTT 5 broker to keep packets from us that would only fill our memory."""
        if self._protocol != MQTTProtocolVersion.MQTTv5:
            return None
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = PACKET_LIMIT_BYTES
        return properties

    def _drop(self, reason: str, *, notify: bool = True, patient: bool = False) -> None:
        """Ends this connection (if any) and plans the next one.

        ``patient``: what is missing may come by itself, so it is a warning only after :data:`PATIENT_ATTEMPTS`.
        """
        client, self._client = self._client, None
        if client is None:
            return
        was_up, self.is_up = self.is_up, False
        for timer in self._timers:
            timer.cancel()
        self._acks.clear()
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            self._fd = -1
        client.on_disconnect = client.on_socket_close = client.on_socket_unregister_write = None
        sock = client.socket()
        if sock is not None:
            sock.close()
        if self._reached and not self._answered and self._settings.protocol == "auto" and not self._five_works:
            # Old brokers end a connection of a protocol they do not speak, with or without saying so.
            five = self._protocol == MQTTProtocolVersion.MQTTv5
            self._protocol = MQTTProtocolVersion.MQTTv311 if five else MQTTProtocolVersion.MQTTv5
        self._reached = False
        if was_up:
            stable = self._loop.now() - self._up_at > STABLE_S
            self._attempt = 0 if stable else self._attempt
            self.rapid_losses = 0 if stable else self.rapid_losses + 1
        if notify:
            tells = was_up or self._attempt == (PATIENT_ATTEMPTS if patient else 0)
            log.log(logging.WARNING if tells else logging.INFO, "link down: %s", reason)
            self._on_down(reason)
        if self._started:
            limit_s = min(self._settings.backoff_limit_s, self._settings.backoff_first_s * 2**self._attempt)
            self._attempt = min(self._attempt + 1, 16)
            self._loop.call_later(limit_s * self._random.uniform(0.5, 1.0), self._reconnect)

    def _reconnect(self) -> None:
        if self._started and self._client is None:
            self._connect()

    # Callbacks of paho

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if client is not self._client:
            return
        self._answered = "rotocol" not in str(reason)
        if reason.is_failure:
            self._loop.call_soon(lambda: self._drop(f"the broker refused {self._settings.client_id!r}: {reason}"))
            return
        self._five_works = self._five_works or self._protocol == MQTTProtocolVersion.MQTTv5
        limit = getattr(properties, "MaximumPacketSize", None)
        self.max_packet_bytes = min(PACKET_LIMIT_BYTES, limit or PACKET_LIMIT_BYTES)
        receive_maximum = getattr(properties, "ReceiveMaximum", None)
        if receive_maximum and receive_maximum < self._inflight:  # paho cannot be told on a standing connection
            self._inflight = receive_maximum
            self._loop.call_soon(lambda: self._drop(f"the broker takes {receive_maximum} messages at a time"))
            return
        client.subscribe(self._topics)

    def _subscribed(self, client: paho.Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if client is not self._client:
            return
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            log.error("the broker refuses a subscription of %r: %s", self._settings.client_id, refused[0])
        if self.is_up:
            return
        for timer in self._timers:
            timer.cancel()
        self._timers = [self._loop.call_later(self._settings.keepalive_s / 4, self._housekeep)]
        self.is_up, self._up_at = True, self._loop.now()
        self._loop.call_soon(self._announce_up)

    def _announce_up(self) -> None:
        if self.is_up:
            log.info("link up: %s as %r", self._settings.url, self._settings.client_id)
            self._on_up()

    def _received(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if client is self._client:
            self.received_bytes += packet_bytes(message.topic, len(message.payload))
            self._receiving = True
            try:
                self._on_message(message.topic, bytes(message.payload))
            finally:
                self._receiving = False

    def _published(self, client: paho.Client, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        if client is self._client:
            if reason.is_failure and not self._refusal_told:
                self._refusal_told = True
                log.error(
                    "the broker refuses messages of %r: %s; its certificate or user name must bear this name",
                    self._settings.client_id,
                    reason,
                )
            action = self._acks.pop(mid, None)
            if action is not None:
                self._loop.call_soon(action)

    def _disconnected(self, client: paho.Client, _data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if client is self._client:
            text = str(reason)
            if flags.is_disconnect_packet_from_server:  # MQTT 5 says why
                detail = getattr(properties, "ReasonString", "")
                text = f"the broker ended it: {reason}" + (f" ({detail})" if detail else "")
            self._loop.call_soon(lambda: self._drop(text) if client is self._client else None)

    # Socket events

    def _socket_opened(self, client: paho.Client, _data: Any, sock: Any) -> None:
        if sock.getsockname() == sock.getpeername():  # nobody listens there, and the kernel chose that very port for us
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it a round trip costs 90 ms
        self._reached = True
        self._fd = sock.fileno()
        self._loop.watch(self._fd, READ, lambda events: self._socket_ready(client, events))

    def _socket_closed(self, client: paho.Client, _data: Any, sock: Any) -> None:
        if client is self._client and self._fd == sock.fileno():
            self._loop.unwatch(self._fd)
            self._fd = -1

    def _socket_wants_write(self, client: paho.Client, _data: Any, _sock: Any) -> None:
        if client is self._client and self._fd >= 0:
            self._loop.watch(self._fd, READ | WRITE, lambda events: self._socket_ready(client, events))

    def _socket_wrote(self, client: paho.Client, _data: Any, _sock: Any) -> None:
        if client is self._client and self._fd >= 0:
            self._loop.watch(self._fd, READ, lambda events: self._socket_ready(client, events))

    def _socket_ready(self, client: paho.Client, events: int) -> None:
        if events & WRITE and client is self._client:
            client.loop_write()
        if events & READ and self._client is not None and client is self._client:
            end_s = self._loop.now() + READ_S
            self._client.read(lambda: self._loop.now() < end_s)
            sock = client.socket()
            if isinstance(sock, ssl.SSLSocket) and client is self._client and sock.pending():
                # Bytes already decrypted do not wake the selector.
                self._loop.call_later(0.0, lambda: self._socket_ready(client, READ))

    def _housekeep(self) -> None:
        if self.is_up and self._client is not None:
            self._client.loop_misc()  # sends PINGREQ, notices a dead peer
            self._timers = [self._loop.call_later(self._settings.keepalive_s / 4, self._housekeep)]
