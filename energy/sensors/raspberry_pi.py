"""Raspberry Pi 5 and its relatives: the power management chip, asked through ``vcgencmd pmic_read_adc``.

The firmware prints a current and a voltage for each of its regulators; they are paired by name, since their numbers
differ (``VDD_CORE_A`` is 7, ``VDD_CORE_V`` is 15), and names differ between firmwares (``0V8_SW`` and ``0V8_SYS``).
The sum is what leaves the regulators. Measurements at the input found 13 to 15 % and about 0.6 W more, differently from
board to board, so nothing is corrected here. Every reading starts a process and takes milliseconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from energy.errors import SensorError
from energy.sensors._files import board_model, run_command, watts_within
from energy.sensors.base import Domain, Rail, Sensor, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAME = "raspberry-pi"
COMMAND = ("vcgencmd", "pmic_read_adc")
INTERVAL_S = 1.0

_LINE = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=(\S+?)[AV]\s*$", re.MULTILINE)
_ALIASES = {"0V8_SYS": "0V8_SW"}  # one regulator; firmwares disagree, sometimes within one answer
_LIMIT_WATTS = 60.0
_RAIL_LIMIT_WATTS = 40.0
_COVERS = (
    "sum of the regulators on the board (cores, memory, board logic); not USB devices, HATs, NVMe, fan and the losses "
    "of the regulators: the input draws some 15 % more"
)
_OTHER = "only the Pi 5 and its relatives measure power; use a smart plug, or the modelled sensor with a calibration"


class PowerChip:
    """The rails that the firmware names, one process per reading."""

    slow = True

    def __init__(self, run: Callable[[Sequence[str]], str]) -> None:
        self._run = run
        currents, voltages = self._ask()
        self._names = tuple(name for name in currents if name in voltages)
        alone = sorted(set(currents) - set(voltages))
        if not self._names:
            message = f"{NAME}: {' '.join(COMMAND)} names no rail with current and voltage; {_OTHER}"
            raise SensorError("unsupported", message)
        missing = f"; {', '.join(alone)} without a voltage" if alone else ""
        self.source = Source(NAME, "module", "power", _COVERS + missing)
        self.domain: Domain = "system"
        self.interval_s = INTERVAL_S
        self.rails = tuple(Rail(name, "rail", "watts", limit_watts=_RAIL_LIMIT_WATTS) for name in self._names)

    def read(self) -> tuple[float, ...]:
        """Watts of every rail; see :class:`energy.sensors.base.Sensor`."""
        currents, voltages = self._ask()
        values = []
        for name in self._names:
            if name not in currents or name not in voltages:
                raise SensorError(
                    "vanished", f"{NAME}: the firmware names {name} no more; start again after its update"
                )
            watts = currents[name] * voltages[name]
            if watts:  # a regulator may rest
                watts_within(watts, _RAIL_LIMIT_WATTS, f"{NAME}: {name}")
            values.append(watts)
        watts_within(sum(values), _LIMIT_WATTS, f"{NAME}: the total")
        return tuple(values)

    def close(self) -> None:
        """Nothing is held between readings."""

    def _ask(self) -> tuple[dict[str, float], dict[str, float]]:
        try:
            text = self._run(COMMAND)
        except FileNotFoundError as error:
            message = (
                f"{NAME}: vcgencmd is not installed; apt-get install raspi-utils (libraspberrypi-bin on older systems)"
            )
            raise SensorError("unsupported", message) from error
        except PermissionError as error:
            message = f"{NAME}: vcgencmd may not open /dev/vcio; add this user to the group video and start again"
            raise SensorError("permission", message) from error
        except OSError as error:
            raise SensorError("unsupported", f"{NAME}: vcgencmd failed ({error.strerror}); {_OTHER}") from error
        return _parsed(text)


def probe(root: Path = Path("/"), *, run: Callable[[Sequence[str]], str] | None = None) -> list[Sensor]:
    """The power chip of a Raspberry Pi 5.

    Raises:
        SensorError: this is no Raspberry Pi, it has no such chip, or the firmware cannot be asked.
    """
    model = board_model(root)
    if "Raspberry Pi" not in model:
        raise SensorError("absent", f"{NAME}: this is no Raspberry Pi")
    try:
        chip = PowerChip(run or run_command)
    except SensorError as error:
        raise SensorError(error.fault, f"{error} ({model})") from error
    chip.read()
    return [chip]


def _parsed(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """Amperes and volts by name of the regulator."""
    if "error=" in text:  # an older firmware answers so, with exit status 0
        raise SensorError("unsupported", f"{NAME}: the firmware does not know {COMMAND[1]}; {_OTHER}")
    currents: dict[str, float] = {}
    voltages: dict[str, float] = {}
    for name, kind, figure in _LINE.findall(text):
        try:
            value = float(figure)
        except ValueError as error:
            message = f"{NAME}: {name}_{kind} reads {figure!r}, no number; update the firmware"
            raise SensorError("implausible", message) from error
        (currents if kind == "A" else voltages)[_ALIASES.get(name, name)] = value
    return currents, voltages
