"""paho-mqtt, imported without what it never uses here.

paho imports ``urllib.request`` (with it HTTP and e-mail, 1.7 MB of memory) to look up proxies for PySocks. Where
PySocks is not installed it never touches it, so the import is left out; the idle agent's memory is the product.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

_UNUSED = "urllib.request"

if _UNUSED not in sys.modules and find_spec("socks") is None:
    sys.modules[_UNUSED] = ModuleType(_UNUSED)
    try:
        from paho.mqtt import client
    finally:
        del sys.modules[_UNUSED]  # whoever needs the real module imports it as usual
else:
    from paho.mqtt import client

from typing import TYPE_CHECKING  # noqa: E402 - after the above

from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion  # noqa: E402 - after the above
from paho.mqtt.packettypes import PacketTypes  # noqa: E402
from paho.mqtt.properties import Properties  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CallbackAPIVersion",
    "Client",
    "MQTTErrorCode",
    "MQTTProtocolVersion",
    "PacketTypes",
    "Properties",
    "client",
]


class Client(client.Client):
    """paho's client with a bound on how long it reads: its own would go on for as many packets as it has sent."""

    def read(self, more: Callable[[], bool]) -> None:
        """Handles packets that are there, at least one, until ``more`` says no."""
        while self._sock is not None:
            result = self._packet_read()
            if result > 0:
                self._loop_rc_handle(result)
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS or not more():
                return
