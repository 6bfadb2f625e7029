"""``[energy]`` of ``agent.toml``: the sensor that measures this device, what stands in for it, what its radio costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class PlugConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[energy.plug]``: the smart plug that feeds this device; see :mod:`energy.sensors.plug`."""

    url: str
    kind: Literal["tasmota", "shelly1", "shelly2"]
    topic: str
    channel: Annotated[int, msgspec.Meta(ge=0)] = 0
    username: str | None = None
    password_file: str | None = None
    ca: str | None = None


class EnergyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where joules come from.

    ``sensor``: ``auto`` takes the best that can be read, ``none`` none, else the name of one (``edge-agent check``
    lists them). ``modelled`` is made of ``idle_watts`` and ``busy_watts`` (all cores at work), or of the file that
    ``edge-energy calibrate`` wrote; where these are given it also stands in when no other can be read. It counts the
    CPU time of the machine, or with ``modelled_of = "agent"`` of this agent and its worker alone. ``battery_wh`` is
    what the battery holds when full; None: what its gauge says.
    """

    sensor: str = "auto"
    idle_watts: NotNegative | None = None
    busy_watts: NotNegative | None = None
    calibration: str | None = None
    modelled_of: Literal["machine", "agent"] = "machine"
    radio: Literal["wifi", "lte", "3g", "ethernet"] | None = None
    joules_per_mb_up: NotNegative | None = None
    joules_per_mb_down: NotNegative | None = None
    plug: PlugConfig | None = None
    battery_wh: Annotated[float, msgspec.Meta(gt=0)] | None = None

    @property
    def has_model(self) -> bool:
        """Whether the modelled sensor can be made."""
        return self.calibration is not None or self.busy_watts is not None


def check_energy_config(config: EnergyConfig, limits: Mapping[str, float | None]) -> None:
    """Refuses what the types cannot.

    Args:
        config: the section.
        limits: those of joules, by their keys in ``[limits]``.

    Raises:
        ConfigError: keys that exclude or need each other, or a number that is not finite.
    """
    for key, value in msgspec.structs.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"energy.{key} = {value} is no number to calculate with; leave it out or set one")
    _check_model(config)
    if config.sensor == "plug" and config.plug is None:
        raise ConfigError('energy.sensor = "plug" needs [energy.plug] with url, kind and topic')
    if (config.joules_per_mb_up is None) != (config.joules_per_mb_down is None):
        raise ConfigError("energy.joules_per_mb_up and energy.joules_per_mb_down belong together; set both")
    if config.radio is not None and config.joules_per_mb_up is not None:
        raise ConfigError("energy.radio and energy.joules_per_mb_* say the same thing; leave one of them out")
    for key, limit in limits.items():
        if limit is not None and config.sensor == "none":
            raise ConfigError(f'limits.{key} cannot be kept with energy.sensor = "none"; name a sensor, or "auto"')


def _check_model(config: EnergyConfig) -> None:
    idle, busy = config.idle_watts, config.busy_watts
    if (idle is None) != (busy is None):
        raise ConfigError("energy.idle_watts and energy.busy_watts belong together; set both")
    if idle is not None and busy is not None and busy <= idle:
        raise ConfigError(f"energy.busy_watts = {busy:g} is not above energy.idle_watts = {idle:g}")
    if config.calibration is not None and busy is not None:
        raise ConfigError("energy.calibration brings its own watts; leave out idle_watts and busy_watts")
    if config.sensor == "modelled" and not config.has_model:
        raise ConfigError('energy.sensor = "modelled" needs idle_watts and busy_watts, or calibration')
