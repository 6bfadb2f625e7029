"""The one user of the embedded amqtt broker; loaded by amqtt by name."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amqtt.plugins.base import BaseAuthPlugin

if TYPE_CHECKING:
    from amqtt.session import Session


class PasswordPlugin(BaseAuthPlugin):  # type: ignore[misc]
    """Lets in who knows user name and password."""

    async def authenticate(self, *, session: Session) -> bool:
        """Compares in constant time."""
        given = f"{session.username}\n{session.password}".encode()
        return hmac.compare_digest(given, f"{self.config.username}\n{self.config.password}".encode())

    @dataclass
    class Config:
        """What the embedded broker sets."""

        username: str
        password: str
