"""Which sensors ``[energy]`` of ``agent.toml`` comes to on this machine: ways to measure, best first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.agent.energy_config import EnergyConfig, PlugConfig
    from energy.sensors.base import Sensor
    from energy.sensors.discovery import Refusal

ROOT = Path("/")


class Survey(NamedTuple):
    """What can be read here. ``ways``: best first; whoever takes them closes their sensors. ``refused``: and why."""

    ways: list[tuple[Sensor, ...]]
    refused: tuple[Refusal, ...]


def survey(config: EnergyConfig, *, busy_s: Callable[[], float] | None = None, root: Path = ROOT) -> Survey:
    """Looks for sensors by reading them; the modelled one is last, where it can be made.

    A sensor that is named and cannot be read now is among the refused, and the modelled one stands in for it.

    Args:
        config: what is wanted.
        busy_s: CPU seconds of the agent and its worker, for ``modelled_of = "agent"``.
        root: below which files of the system are looked up.

    Raises:
        ConfigError: a sensor that does not exist, or a calibration that cannot be read.
    """
    if config.sensor == "none":
        return Survey([], ())
    modelled = [(_modelled(config, busy_s, root),)] if config.has_model else []
    if config.sensor == "modelled":
        return Survey([*modelled], ())
    ways, refused = _measured(config, root)
    return Survey([*ways, *modelled], refused)


def _measured(config: EnergyConfig, root: Path) -> tuple[list[tuple[Sensor, ...]], tuple[Refusal, ...]]:
    from energy.errors import SensorError, UsageError
    from energy.sensors.discovery import Found, Refusal, choose, discover

    found = discover(root)
    if config.plug is not None and config.sensor in ("auto", "plug"):
        try:
            found = Found((*found.sensors, _plug(config.plug)), found.refused)
        except SensorError as error:
            found = Found(found.sensors, (*found.refused, Refusal("plug", error.fault, str(error))))
    try:
        ways = choose(found, config.sensor)
    except UsageError as error:
        if config.sensor not in {refusal.sensor for refusal in found.refused}:
            for sensor in found.sensors:
                sensor.close()
            raise ConfigError(f"energy.sensor: {error}") from error
        ways = []
    used = {id(sensor) for way in ways for sensor in way}
    for sensor in found.sensors:
        if id(sensor) not in used:
            sensor.close()
    return ways, found.refused


def _plug(config: PlugConfig) -> Sensor:
    from energy.sensors.plug import Plug, PlugSettings

    secret, authority = config.password_file, config.ca
    return Plug(
        PlugSettings(
            broker=config.url,
            kind=config.kind,
            topic=config.topic,
            channel=config.channel,
            user=config.username,
            password_file=None if secret is None else Path(secret),
            ca_file=None if authority is None else Path(authority),
        )
    )


def _modelled(config: EnergyConfig, busy_s: Callable[[], float] | None, root: Path) -> Sensor:
    from energy.errors import EnergyError
    from energy.sensors.modelled import Modelled, machine_busy_s

    try:
        busy_s = busy_s or machine_busy_s(root)
        if config.idle_watts is not None and config.busy_watts is not None:
            return Modelled(config.idle_watts, config.busy_watts, busy_s)
        from energy.calibration import load_calibration

        assert config.calibration is not None
        fitted = load_calibration(Path(config.calibration))
        origin = f"{fitted.sensor} ({fitted.scope})"
        return Modelled(fitted.idle_watts, fitted.busy_watts, busy_s, cores=fitted.cores, fitted_to=origin)
    except EnergyError as error:
        raise ConfigError(f"energy: {error}") from error
