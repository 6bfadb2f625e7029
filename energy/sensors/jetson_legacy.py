"""Jetson boards with JetPack 4 (Nano, TX1, TX2, Xavier): INA3221 power monitors in the kernel's iio tree.

The rails have the names of those days (``POM_5V_IN``, ``POM_5V_GPU``, ``SYS5V``...), and ``in_powerN_input`` is in
milliwatts, where hwmon's ``powerN_input`` is in microwatts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from energy.errors import SensorError
from energy.sensors._files import KernelFile, look
from energy.sensors.jetson import Channel, chips, made, unique

if TYPE_CHECKING:
    from energy.sensors.base import Sensor

NAME = "jetson-legacy"

_CHANNELS = (0, 1, 2)


def probe(root: Path = Path("/")) -> list[Sensor]:
    """The module's INA3221 chips.

    Raises:
        SensorError: there are none, or they cannot be read.
    """
    channels: list[Channel] = []
    for chip in chips(root, "ina3221", "iio"):
        for number in _CHANNELS:
            label = look(chip / f"rail_name_{number}")
            if not label or label.upper() == "NC":
                continue
            power = chip / f"in_power{number}_input"
            if power.exists():
                factors, scale = [KernelFile(power, NAME)], 1e-3  # mW
            else:
                kinds = ("voltage", "current")
                factors, scale = [KernelFile(chip / f"in_{kind}{number}_input", NAME) for kind in kinds], 1e-6  # mV, mA
            channels.append(Channel(unique(label, channels), factors, scale))
    if not channels:
        raise SensorError("absent", f"{NAME}: no INA3221 in iio with named rails; Jetsons with JetPack 4 have")
    return [made(channels, NAME)]
