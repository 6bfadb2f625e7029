"""Which sensors this machine has, and which way of measuring is best.

Sensors that need settings (a smart plug, the modelled one) are made by who has these, and added to what is found.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from energy.errors import Fault, SensorError, UsageError
from energy.sensors._files import fault_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from energy.sensors.base import Quality, Scope, Sensor

MODULES = ("thor", "jetson", "jetson_legacy", "raspberry_pi", "battery", "rapl", "nvml")  # of equals, the first is best

# Sensors that are made of settings, and of which ones.
SETTINGS = {
    "plug": "its settings: --plug and --broker, or [energy.plug] in agent.toml",
    "modelled": "watts: --model, or --idle-watts and --busy-watts (in agent.toml: calibration, or those two)",
}
KNOWN = (*(name.replace("_", "-") for name in MODULES), *SETTINGS)

_SCOPES: tuple[Scope, ...] = ("board", "module", "rail", "package", "modelled")
_QUALITIES: tuple[Quality, ...] = ("counter", "power", "coarse", "modelled")


class Refusal(NamedTuple):
    """A sensor that cannot be used here, and why in words; ``absent`` ones among them."""

    sensor: str
    fault: Fault
    reason: str


class Found(NamedTuple):
    """What a search came to. Who takes it closes the sensors."""

    sensors: tuple[Sensor, ...]
    refused: tuple[Refusal, ...]


def discover(root: Path = Path("/")) -> Found:
    """Every sensor that answers a real read, looked up below ``root``. Raises nothing: what fails is in ``refused``."""
    sensors: list[Sensor] = []
    refused: list[Refusal] = []
    for name in MODULES:
        module, shown = importlib.import_module(f"energy.sensors.{name}"), name.replace("_", "-")
        try:
            sensors += module.probe(root)
        except SensorError as error:
            refused.append(Refusal(shown, error.fault, str(error)))
        except OSError as error:  # a folder of the system that may not be entered
            refused.append(Refusal(shown, fault_of(error), f"{shown}: {error}; run where /sys and /proc may be read"))
        except Exception as error:  # noqa: BLE001 - whatever a driver says, the other sensors are looked for
            text = f"{shown}: looking for it failed with {type(error).__name__} ({error}); report this"
            refused.append(Refusal(shown, "implausible", text))
    return Found(tuple(sensors), tuple(refused))


def ranked(sensors: Iterable[Sensor]) -> list[tuple[Sensor, ...]]:
    """Ways to know what the machine draws, best first; the sensors of one way are added.

    One way is a sensor of the whole system, or one of the CPU together with the best of the graphics cards; where both
    exist, the CPU alone comes after them. Graphics cards alone are no way: they know nothing of what the CPU draws, and
    are used alone only if they are named. Measured comes before modelled, then board before module before package, then
    counters and power before coarse. Of equals CPU and graphics together come first, since a counter of the platform
    may leave graphics cards out; then the first given one.
    """
    every = list(sensors)
    ways = [(sensor,) for sensor in every if sensor.domain == "system"]
    cpus = sorted((sensor for sensor in every if sensor.domain == "cpu"), key=_rank)
    gpus = sorted((sensor for sensor in every if sensor.domain == "gpu"), key=_rank)[:1]
    together: list[tuple[Sensor, ...]] = [(cpu, *gpus) for cpu in cpus]
    alone: list[tuple[Sensor, ...]] = [(cpu,) for cpu in cpus] if gpus else []
    return sorted([*ways, *together, *alone], key=lambda way: (max(_rank(sensor) for sensor in way), -len(way)))


def choose(found: Found, wanted: str = "auto") -> list[tuple[Sensor, ...]]:
    """Ways to measure: ``auto`` all of them, best first; the name of a sensor that one alone; ``none`` no way.

    Raises:
        UsageError: no such sensor here; the message says which there are, and why that one was refused. A name that no
            sensor has is answered with those that there are.
    """
    if wanted == "auto":
        return ranked(found.sensors)
    if wanted == "none":
        return []
    name = wanted.replace("_", "-").lower()
    ways = [(sensor,) for sensor in found.sensors if sensor.source.sensor == name]
    if ways:
        return list(ways)
    here = [sensor.source.sensor for sensor in found.sensors]
    can = f"readable here: {', '.join(here)}" if here else "none can be read here"
    why = next((refusal.reason for refusal in found.refused if refusal.sensor == name), None)
    if name in SETTINGS and why is None:
        raise UsageError(f"sensor {wanted!r} needs {SETTINGS[name]}")
    if why is not None or name in KNOWN:
        raise UsageError(f"sensor {wanted!r} cannot be read on this machine ({can}){'' if why is None else f'; {why}'}")
    from difflib import get_close_matches  # only for the message

    known = list(dict.fromkeys((*KNOWN, *here)))
    close = get_close_matches(name, [*known, "auto", "none"], 1, 0.7)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"no sensor is called {wanted!r}{meant} (choose auto, none, or one of: {', '.join(known)}; {can})")


def _rank(sensor: Sensor) -> tuple[bool, int, bool]:
    source = sensor.source
    modelled = source.modelled or source.scope == "modelled"
    return modelled, _SCOPES.index(source.scope), _QUALITIES.index(source.quality) >= _QUALITIES.index("coarse")
