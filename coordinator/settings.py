"""What the server is told: where it keeps things, and which broker it uses or starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from coordinator.broker import USERNAME, password_file, start_broker
from edge_runtime.transport.link import LinkSettings

if TYPE_CHECKING:
    from coordinator.broker import Broker


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the coordinator keeps things and which broker it uses; without ``broker_url`` it starts one itself.

    ``workers`` processes check updates and sum them; 0: threads of this process do.
    """

    state_dir: Path
    broker_url: str | None = None
    broker_port: int = 0
    embedded: Literal["mosquitto", "amqtt"] = "mosquitto"
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    database_url: str | None = None
    name: str = "coordinator"
    workers: Annotated[int, msgspec.Meta(ge=0)] = 0


class Connection:
    """The coordinator's way to its broker, which is started here if the settings name none.

    Raises:
        TransportError: the embedded broker does not start.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.broker: Broker | None = None
        url, username, secret = settings.broker_url, settings.username, settings.password_file
        protocol: Literal["auto", "3.1.1"] = "auto"
        if url is None:
            folder = settings.state_dir / "broker"
            self.broker, url = start_broker(folder, port=settings.broker_port, prefer=settings.embedded)
            username, secret = USERNAME, password_file(folder)
            protocol = "3.1.1" if self.broker.kind == "amqtt" else "auto"
        self._secret = secret
        self.link = LinkSettings(
            url=url,
            client_id=settings.name,
            username=username,
            password=None if secret is None else lambda: secret.read_text(encoding="utf-8").strip(),
            ca_file=None if settings.ca is None else str(settings.ca),
            certificate_file=None if settings.certificate is None else str(settings.certificate),
            key_file=None if settings.key is None else str(settings.key),
            insecure=settings.insecure,
            protocol=protocol,
        )

    def described(self) -> dict[str, Any]:
        """How agents on this machine reach the broker: url, username, password_file, broker (its kind), protocol."""
        return {
            "url": self.link.url,
            "username": self.link.username,
            "password_file": None if self._secret is None else str(self._secret.resolve()),
            "broker": "external" if self.broker is None else self.broker.kind,
            "protocol": self.link.protocol,
        }

    def revive_broker(self) -> None:
        """Starts the embedded broker again, on its port and with its password, if it has ended."""
        if self.broker is not None:
            self.broker.revive()

    def stop(self) -> None:
        """Ends the broker, if it was started here."""
        if self.broker is not None:
            self.broker.stop()
