"""``agent.toml``: who this device is, where the broker is, what data it offers and what it may spend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_runtime.agent.energy_config import EnergyConfig, check_energy_config
from edge_runtime.agent.hours import parse_hours
from edge_runtime.data.config import DatasetConfig
from edge_runtime.errors import ConfigError
from edge_runtime.files import load_toml
from edge_runtime.transport.link import LinkSettings, parse_url

MB = 1_000_000
Positive = Annotated[float, msgspec.Meta(gt=0)]
LEAST_JOULES = 1.0  # of a limit: heartbeats say what is left of it in whole joules
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The broker. ``password_file`` holds the password on one line and is read at every connection.

    ``username`` is the device's name unless another one is given.
    """

    url: str
    username: str | None = None
    password_file: str | None = None
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    insecure: bool = False
    keepalive_s: Annotated[int, msgspec.Meta(ge=5, le=3600)] = 60
    protocol: Literal["auto", "5", "3.1.1"] = "auto"


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the agent may use; see :mod:`edge_runtime.agent.limits`. Training stops when a limit is crossed.

    At ``worker_memory_mb``, ``job_wall_s`` and ``min_free_memory_mb`` the job fails; at the others it ends after its
    step and sends what it reached. The agent stays.
    """

    blob_mb: Positive = 500.0
    cache_mb: Positive = 1000.0
    spool_mb: Positive = 1000.0
    worker_memory_mb: Positive | None = None
    worker_nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    worker_threads: Annotated[int, msgspec.Meta(ge=1)] = 1
    worker_linger_s: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    job_wall_s: Positive = 6 * 3600.0
    job_joules: Positive | None = None
    max_temperature_c: float | None = None
    battery_reserve_percent: Percent | None = None
    min_free_memory_mb: float | None = None
    only_when_charging: bool = False
    only_unmetered: bool = False
    hours: str | None = None
    joules_per_day: Positive | None = None
    data_mb_per_month: Positive | None = None


class LinkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[link]``. ``metered``: whether every byte is paid for; ``auto`` goes by the interface of the connection."""

    metered: bool | Literal["auto"] = "auto"


class TelemetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[telemetry]``. ``file``: what the agent cannot measure here; see :mod:`edge_runtime.agent.telemetry_file`."""

    file: str | None = None


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything in ``agent.toml``. ``device`` is the MQTT user name, client id and certificate name in one.

    ``code_dir`` comes first where the modules of dataset factories are looked for: the folder of ``agent.toml``.
    """

    device: str
    state_dir: str
    broker: BrokerConfig
    data: list[DatasetConfig]
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    energy: EnergyConfig = msgspec.field(default_factory=EnergyConfig)
    link: LinkConfig = msgspec.field(default_factory=LinkConfig)
    telemetry: TelemetryConfig = msgspec.field(default_factory=TelemetryConfig)
    heartbeat_interval_s: Positive = 50.0  # under keepalive_s, so that it spares the pings
    code_dir: str = ""


def load_agent_config(path: Path) -> AgentConfig:
    """Reads ``agent.toml``; relative paths inside count from the file's folder.

    Raises:
        ConfigError: unreadable, an unknown key, a wrong type, an unusable device name, two datasets of one name, or a
            broker URL that would send models unencrypted over a network, or energy keys that contradict each other.
    """
    config = load_toml(path, AgentConfig)
    folder = path.parent
    broker, plug = config.broker, config.energy.plug

    def absolute(name: str | None) -> str | None:
        return None if name is None else str(folder / name)

    config = msgspec.structs.replace(
        config,
        state_dir=str(folder / config.state_dir),
        code_dir=str((folder / config.code_dir).absolute()),
        broker=msgspec.structs.replace(
            broker,
            password_file=absolute(broker.password_file),
            ca=absolute(broker.ca),
            certificate=absolute(broker.certificate),
            key=absolute(broker.key),
        ),
        energy=msgspec.structs.replace(
            config.energy,
            calibration=absolute(config.energy.calibration),
            plug=None
            if plug is None
            else msgspec.structs.replace(plug, password_file=absolute(plug.password_file), ca=absolute(plug.ca)),
        ),
        telemetry=TelemetryConfig(file=absolute(config.telemetry.file)),
        data=[
            msgspec.structs.replace(data, path=str(folder / data.path)) if data.path else data for data in config.data
        ],
    )
    try:
        check_agent_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def check_agent_config(config: AgentConfig) -> None:
    """Refuses what the types cannot; see :func:`load_agent_config`."""
    from edge_runtime.topics import check_name

    check_name("device", config.device)
    names = [check_name("dataset", data.name) for data in config.data]
    if not names:
        raise ConfigError("no [[data]] section: name at least one dataset this device may train on")
    if len(set(names)) != len(names):
        raise ConfigError(f"two [[data]] sections have one name ({', '.join(sorted(names))}); names are unique")
    for section, table in (("", config), ("limits.", config.limits)):
        for key, value in msgspec.structs.asdict(table).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{section}{key} = {value} is no number to measure against; leave it out or set one")
    limits = config.limits
    if limits.hours is not None:
        parse_hours(limits.hours)
    day_joules = limits.joules_per_day
    if day_joules is not None and day_joules < LEAST_JOULES:
        cure = f"set {LEAST_JOULES:g} or more, or leave it out"
        raise ConfigError(f"limits.joules_per_day = {day_joules:g} is less than can be kept account of; {cure}")
    by_day = day_joules if config.telemetry.file is None else None  # that file may say what steps draw
    check_energy_config(config.energy, {"job_joules": limits.job_joules, "joules_per_day": by_day})
    parse_url(config.broker.url, insecure=config.broker.insecure)


def link_settings(config: AgentConfig) -> LinkSettings:
    """The agent's connection to the broker."""
    broker = config.broker
    return LinkSettings(
        url=broker.url,
        client_id=config.device,
        username=config.device if broker.username is None and broker.password_file else broker.username,
        password=None if broker.password_file is None else lambda: read_secret(broker.password_file),
        ca_file=broker.ca,
        certificate_file=broker.certificate,
        key_file=broker.key,
        insecure=broker.insecure,
        keepalive_s=broker.keepalive_s,
        protocol=broker.protocol,
    )


def read_secret(path: str | None) -> str | None:
    """One line of a secrets file; None without a path.

    Raises:
        OSError: it cannot be read; the link reports that and tries again.
    """
    return None if path is None else Path(path).read_text(encoding="utf-8").strip()
