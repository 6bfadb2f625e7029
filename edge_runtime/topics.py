"""MQTT topics: who writes what, so that a broker can enforce it with two patterns per device.

``fl/v1/d/<device>/...`` is written by that device only, ``fl/v1/c/<device>/...`` is read by it only (the coordinator
writes), ``fl/v1/b/...`` is read by all (the coordinator writes).
"""

from __future__ import annotations

import re

from edge_runtime.errors import ConfigError

ROOT = "fl/v1"
COORDINATOR = f"{ROOT}/b/coordinator"  # retained: the coordinator's session; last will: offline
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(kind: str, name: str) -> str:
    """Returns a device, run or dataset name if it is one that fits into a topic.

    Raises:
        ConfigError: the name holds other than letters, digits, ``_``, ``.``, ``-``, or is longer than 64.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{kind} name {name!r} is not usable: take 1 to 64 letters, digits, '_', '.' or '-'")
    return name


def from_device(device: str, leaf: str) -> str:
    """Topic that ``device`` writes: ``state`` and ``heartbeat`` (both retained), ``message``, ``chunk``."""
    return f"{ROOT}/d/{device}/{leaf}"


def to_device(device: str, leaf: str) -> str:
    """Topic that only ``device`` reads: ``message``, ``chunk``."""
    return f"{ROOT}/c/{device}/{leaf}"


def blob(sha256: str) -> str:
    """Topic on which chunks of one blob go to all devices that need it."""
    return f"{ROOT}/b/blob/{sha256}"


def parse_from_device(topic: str) -> tuple[str, str] | None:
    """(device, leaf) of a device's topic, or None for any other topic."""
    parts = topic.split("/")
    if len(parts) != 5 or parts[:3] != ["fl", "v1", "d"]:
        return None
    return parts[3], parts[4]
