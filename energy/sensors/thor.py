"""Jetson Thor: an INA238 at the input of the carrier board (``VIN``), and an INA3221 for rails of the module.

``VIN`` feeds everything, so it is the total. The kernel gives the chip's own power register in microwatts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from energy.errors import SensorError
from energy.sensors._files import KernelFile, board_model, look
from energy.sensors.jetson import Channel, RailSensor, chips, hwmon_channels, source, tried, unique

if TYPE_CHECKING:
    from energy.sensors.base import Sensor

NAME = "thor"

_COVERS = (
    "the whole board at its input VIN: module, carrier board and what they feed; not the power supply's own losses"
)
_BOARD = "Thor"
LIMIT_WATTS = 400.0  # at the input: a module made for 130 W, its carrier board, and what hangs on that


def probe(root: Path = Path("/")) -> list[Sensor]:
    """The INA238 of the board's input, with the module's rails beside it.

    Raises:
        SensorError: there is none, or it cannot be read.
    """
    found = list(chips(root, "ina238", "hwmon"))
    inputs = [chip for chip in found if _label(chip) == "VIN"]
    if not inputs and _BOARD in board_model(root):
        inputs = found  # a tree without labels: this board has one INA238, at its input
    if not inputs:
        raise SensorError("absent", f"{NAME}: no INA238 that measures VIN; a Jetson Thor has one")
    chip = inputs[0]
    power = chip / "power1_input"
    if power.exists():
        total = Channel("VIN", [KernelFile(power, NAME)], 1e-6)  # uW
    else:
        total = Channel("VIN", [KernelFile(chip / f"{kind}1_input", NAME) for kind in ("in", "curr")], 1e-6)  # mV, mA
    channels = [total]
    for rail in hwmon_channels(root, NAME):
        channels.append(rail._replace(label=unique(rail.label, channels)))
    return [tried(RailSensor(channels, ["VIN"], source(NAME, "board", _COVERS), limit_watts=LIMIT_WATTS))]


def _label(chip: Path) -> str | None:
    names = ("label", "in1_label", "power1_label", "curr1_label")
    return next((text.upper() for text in (look(chip / name) for name in names) if text), None)
