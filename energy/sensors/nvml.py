"""NVIDIA graphics cards through NVML (extra ``nvml``): the energy counter of Volta and later, power of older ones.

On a Jetson the library starts, finds the GPU, and answers every question with NotSupported: so every question is asked
once before a card counts as a sensor. Counters and power advance every 20 to 100 ms; on several cards NVML averages
power over a second, and samples only a part of the time (Yang et al., Part-time Power Measurements, SC 2024).
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from energy.errors import Fault, SensorError
from energy.sensors._files import watts_within
from energy.sensors.base import Domain, Quality, Rail, Sensor, Source

NAME = "nvml"
INTERVAL_S = 0.1

_LIMIT_WATTS = 2000.0
_COVERS = "the graphics cards alone, each with its memory ({})"
_CAUSES = {  # nvmlClocksEventReasons that slow a card down; idle and requested clocks are none
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "too hot (driver)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}
_FAULTS: dict[int, Fault] = {
    3: "unsupported",
    4: "permission",
    9: "unsupported",
    12: "absent",
    13: "unsupported",
}  # NVML_ERROR_*


class Card(NamedTuple):
    """One graphics card; ``counts`` says whether it has an energy counter."""

    name: str
    handle: Any
    counts: bool


class Cards:
    """All cards of this machine that say what they draw."""

    def __init__(self, library: Any, cards: list[Card], silent: list[str]) -> None:
        self._library = library
        self._cards = tuple(cards)
        self._last = [0.0] * len(cards)
        covers = _COVERS.format(", ".join(card.name for card in cards))
        if silent:
            covers += f"; not {', '.join(silent)}, which tell nothing"
        quality: Quality = "counter" if all(card.counts for card in cards) else "power"
        self.source = Source(NAME, "package", quality, covers)
        self.domain: Domain = "gpu"
        self.interval_s = INTERVAL_S
        self.rails = tuple(
            Rail(f"gpu{index}", "package", "joules" if card.counts else "watts", limit_watts=_LIMIT_WATTS)
            for index, card in enumerate(cards)
        )

    def read(self) -> tuple[float, ...]:
        """Joules or watts of every card; see :class:`energy.sensors.base.Sensor`."""
        return tuple(self._value(index, card) for index, card in enumerate(self._cards))

    def close(self) -> None:
        """The library stays loaded: others may use it."""

    def _value(self, index: int, card: Card) -> float:
        try:
            if not card.counts:
                watts = float(self._library.nvmlDeviceGetPowerUsage(card.handle)) * 1e-3
                return watts_within(watts, _LIMIT_WATTS, f"{NAME}: {card.name}")
            joules = float(self._library.nvmlDeviceGetTotalEnergyConsumption(card.handle)) * 1e-3
        except self._library.NVMLError as error:
            raise _sensor_error(error, card.name, "vanished") from error
        if joules < self._last[index]:
            before, self._last[index] = self._last[index], joules
            message = (
                f"{NAME}: counter of {card.name} fell from {before:g} J to {joules:g} J; its driver was loaded again"
            )
            raise SensorError("implausible", message)
        self._last[index] = joules
        return joules


def probe(root: Path = Path("/"), *, library: Any = None) -> list[Sensor]:
    """The NVIDIA cards of this machine; ``library`` stands in for the module ``pynvml``.

    Raises:
        SensorError: there is none, the library is missing, or no card says what it draws.
    """
    library = started(root) if library is None else _start(library)
    cards: list[Card] = []
    silent: list[str] = []
    for name, handle in _handles(library):
        answer = _first_answer(library, handle, name)
        if answer is None:
            silent.append(name)
        else:
            cards.append(Card(name, handle, answer))
    if not cards:
        what = f"{', '.join(silent)} answers NotSupported" if silent else "the driver lists no card"
        message = f"{NAME}: {what}; on a Jetson the sensor jetson measures, else update the driver"
        raise SensorError("unsupported", message)
    sensor = Cards(library, cards, silent)
    sensor.read()
    return [sensor]


@lru_cache(maxsize=4)
def started(root: Path) -> Any:
    """The module ``pynvml``, started; once per process, since starting takes long.

    Raises:
        SensorError: no NVIDIA driver below ``root``, no module, or it does not start.
    """
    if not ((root / "dev/nvidiactl").exists() or (root / "proc/driver/nvidia/version").exists()):
        raise SensorError("absent", f"{NAME}: no NVIDIA driver is loaded")
    try:
        library = importlib.import_module("pynvml")
    except ImportError as error:
        message = (
            f"{NAME}: an NVIDIA driver is loaded, and pynvml is missing; pip install 'edge-training-runtime[nvml]'"
        )
        raise SensorError("unsupported", message) from error
    return _start(library)


def throttling(library: Any) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """What slows the cards down now (None: no card tells), and their clocks in hertz."""
    causes: list[str] = []
    clocks: dict[str, int] = {}
    told = False
    try:
        handles = _handles(library)
    except SensorError:
        return None, {}
    for index, (_, handle) in enumerate(handles):
        bits = _reasons(library, handle)
        if bits is not None:
            told = True
            causes += [f"gpu{index}: {cause}" for bit, cause in _CAUSES.items() if bits & bit]
        try:
            clocks[f"gpu{index}"] = int(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)) * 1_000_000
        except library.NVMLError:
            continue
    return (tuple(causes) if told else None), clocks


def _reasons(library: Any, handle: Any) -> int | None:
    """Bits of what holds the clocks of a card down; None if it does not tell. Drivers before 535 know the old name."""
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        try:
            return int(getattr(library, name)(handle))
        except (AttributeError, library.NVMLError):  # the module or the driver does not have it
            continue
    return None


def _start(library: Any) -> Any:
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        raise _sensor_error(error, "the library", "unsupported") from error
    return library


def _handles(library: Any) -> list[tuple[str, Any]]:
    try:
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        return [(_text(library.nvmlDeviceGetName(handle)), handle) for handle in handles]
    except library.NVMLError as error:
        raise _sensor_error(error, "the list of cards", "unsupported") from error


def _first_answer(library: Any, handle: Any, name: str) -> bool | None:
    """Whether a card counts its energy (else it tells its power); None if it tells neither."""
    for counts, question in ((True, "nvmlDeviceGetTotalEnergyConsumption"), (False, "nvmlDeviceGetPowerUsage")):
        try:
            getattr(library, question)(handle)
        except library.NVMLError as error:
            fault = _FAULTS.get(error.value, "vanished")
            if fault != "unsupported":
                raise _sensor_error(error, name, "vanished") from error
        else:
            return counts
    return None


def _sensor_error(error: Any, what: str, otherwise: Fault) -> SensorError:
    fault = _FAULTS.get(error.value, otherwise)
    return SensorError(fault, f"{NAME}: {what} cannot be read ({error}); check nvidia-smi")


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
