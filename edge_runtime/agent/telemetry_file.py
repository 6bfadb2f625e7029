"""``[telemetry] file``: what a script of the user's says about a board whose gauges the agent cannot read.

A JSON object with any of the keys below; they go before what was measured. It is read whenever something is decided, so
the script writes a new file and renames it over the old one. A key that cannot be believed is left out, or all of a
file that is no JSON object, with one warning that says which.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger("edge.agent")

LIMIT_BYTES = 16_384
_RANGES = {  # lowest and highest that can be believed
    "battery_percent": (0.0, 100.0),
    "temperature_c": (-60.0, 200.0),
    "free_memory_bytes": (0.0, 1e15),
    "up_kbit_s": (0.0, 1e9),
    "down_kbit_s": (0.0, 1e9),
    "step_s": (0.0, 1e6),
    "step_joules": (0.0, 1e9),
    "availability_percent": (0.0, 100.0),
    "battery_wh": (0.01, 1e6),
}
_TRUTHS = ("on_external_power", "link_metered")


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says; None: nothing. Units stand in the names."""

    battery_percent: float | None = None
    on_external_power: bool | None = None
    temperature_c: float | None = None
    free_memory_bytes: float | None = None
    link_metered: bool | None = None
    up_kbit_s: float | None = None
    down_kbit_s: float | None = None
    step_s: float | None = None
    step_joules: float | None = None
    availability_percent: float | None = None
    battery_wh: float | None = None


NOTHING = Told()


class TelemetryFile:
    """The file; ``path`` None: there is none."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._warned = ""

    def read(self) -> Told:
        """What it says now."""
        if self._path is None:
            return NOTHING
        wrong: list[str] = []
        told = self._read(self._path, wrong)
        said = "; ".join(wrong)
        if said and not self._warned:
            part = "nothing in it counts" if told is None else "its other keys count, this is left out"
            log.warning("telemetry.file %s: %s; %s until it is right", self._path, said, part)
        self._warned = said
        return told or NOTHING

    def _read(self, path: Path, wrong: list[str]) -> Told | None:
        try:
            with path.open("rb") as file:
                data = file.read(LIMIT_BYTES + 1)
            table = msgspec.json.decode(data) if len(data) <= LIMIT_BYTES else None
        except OSError as error:
            wrong.append(f"cannot be read ({error.strerror})")
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            wrong.append(f"is no JSON ({error})")
            return None
        if not isinstance(table, dict):
            wrong.append(f"must hold a JSON object of {LIMIT_BYTES} bytes at most")
            return None
        good = {key: value for key, value in table.items() if value is not None and _believable(key, value, wrong)}
        return Told(**good)


def _believable(key: str, value: Any, wrong: list[str]) -> bool:
    if key in _TRUTHS:
        if isinstance(value, bool):
            return True
        wrong.append(f"{key} must be true or false")
    elif key in _RANGES:
        low, high = _RANGES[key]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            return True
        wrong.append(f"{key} must be a number from {low:g} to {high:g}")
    else:
        wrong.append(f"{key!r} is no key; known are {', '.join((*_RANGES, *_TRUTHS))}")
    return False
