"""Which sensors ``[energy]`` of ``agent.toml`` comes to on this machine: ways to measure, best first."""

from __future__ import annotations

import os
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
    """What can be read here.

    ``ways``: best first; whoever takes them closes their sensors. ``refused``: and why. ``core_watts``: what a busy
    core adds, where the modelled sensor counts that of the agent alone.
    """

    ways: list[tuple[Sensor, ...]]
    refused: tuple[Refusal, ...]
    core_watts: float | None = None

    @property
    def measuring(self) -> frozenset[str]:
        """Names of the sensors that are not modelled."""
        sources = [sensor.source for way in self.ways for sensor in way]
        return frozenset(source.sensor for source in sources if not source.modelled)

    def close(self) -> None:
        """Frees the sensors, for who does not take them."""
        for sensor in {id(sensor): sensor for way in self.ways for sensor in way}.values():
            sensor.close()


def survey(
    config: EnergyConfig,
    *,
    busy_s: Callable[[], float] | None = None,
    root: Path = ROOT,
    background: bool = False,
) -> Survey:
    """Looks for sensors by reading them; the modelled one is last, where it can be made.

    A sensor that is named and cannot be read now is among the refused, and the modelled one stands in for it.

    Args:
        config: what is wanted.
        busy_s: CPU seconds of the agent and its worker, for ``modelled_of = "agent"``.
        root: below which files of the system are looked up.
        background: slow sensors are read by threads of their own, and a plug is taken without waiting for its answer.

    Raises:
        ConfigError: a sensor that does not exist, or a calibration that cannot be read.
    """
    if config.sensor == "none":
        return Survey([], ())
    ways: list[tuple[Sensor, ...]] = []
    core_watts = None
    if config.has_model:
        model, core_watts = _modelled(config, busy_s, root)
        ways.append((model,))
    own_watts = None if busy_s is None else core_watts
    if config.sensor == "modelled":
        return Survey(ways, (), own_watts)
    measured, refused = _measured(config, root, connect=not background)
    if background and any(getattr(sensor, "slow", False) for way in measured for sensor in way):
        from energy.sensors.background import wrapped

        measured = wrapped(measured)
    return Survey([*measured, *ways], refused, own_watts)


def _measured(
    config: EnergyConfig, root: Path, *, connect: bool
) -> tuple[list[tuple[Sensor, ...]], tuple[Refusal, ...]]:
    from energy.errors import SensorError, UsageError
    from energy.sensors.discovery import Found, Refusal, choose, discover

    found = discover(root)
    if config.plug is not None and config.sensor in ("auto", "plug"):
        try:
            found = Found((*found.sensors, _plug(config.plug, connect=connect)), found.refused)
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


def _plug(config: PlugConfig, *, connect: bool) -> Sensor:
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
        ),
        connect=connect,
    )


def _modelled(config: EnergyConfig, own_s: Callable[[], float] | None, root: Path) -> tuple[Sensor, float]:
    """The modelled sensor, and what a busy core adds, in watts.

    The idle power of a machine belongs to no single one of its agents, so a model of one agent has none.
    """
    from energy.errors import EnergyError
    from energy.sensors.modelled import Modelled, machine_busy_s

    try:
        idle_watts, busy_watts, cores, fitted_to = _watts(config)
        core_watts = (busy_watts - idle_watts) / cores
        if own_s is None:
            return Modelled(idle_watts, busy_watts, machine_busy_s(root), cores=cores, fitted_to=fitted_to), core_watts
        sensor = Modelled(0.0, busy_watts - idle_watts, own_s, cores=cores, fitted_to=fitted_to)
        origin = f"fitted to {fitted_to}" if fitted_to else "nominal"
        covers = (
            f"nothing measured: {core_watts:.3g} W for every core that this agent and its worker keep busy, {origin}; "
            "without the idle power of the machine, which is no agent's own"
        )
        sensor.source = sensor.source._replace(covers=covers)
    except EnergyError as error:
        raise ConfigError(f"energy: {error}") from error
    return sensor, core_watts


def _watts(config: EnergyConfig) -> tuple[float, float, int, str]:
    """Watts idle and busy, the cores that make the difference, and what that was fitted to."""
    if config.idle_watts is not None and config.busy_watts is not None:
        return config.idle_watts, config.busy_watts, os.cpu_count() or 1, ""
    from energy.metering.calibration import load_calibration

    assert config.calibration is not None
    fitted = load_calibration(Path(config.calibration))
    return fitted.idle_watts, fitted.busy_watts, fitted.cores, f"{fitted.sensor} ({fitted.scope})"
