"""What the owner of a virtual device has set, and how warm the device gets: optional parts of its trace."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import msgspec

from edge_runtime.agent.config import LimitsConfig
from edge_runtime.agent.hours import parse_hours
from edge_runtime.errors import ConfigError

_Above0: TypeAlias = Annotated[float, msgspec.Meta(gt=0.0, le=1e9)]
_Celsius: TypeAlias = Annotated[float, msgspec.Meta(ge=-100.0, le=250.0)]


class OwnerLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """As the keys of ``[limits]`` in ``agent.toml``; hours are of UTC."""

    only_when_charging: bool = False
    only_unmetered: bool = False
    hours: str | None = None
    joules_per_day: _Above0 | None = None
    data_mb_per_month: _Above0 | None = None
    battery_reserve_percent: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    max_temperature_c: _Celsius | None = None

    def __post_init__(self) -> None:
        if self.hours is not None:
            try:
                parse_hours(self.hours)
            except ConfigError as error:
                raise ValueError(str(error)) from error

    def config(self) -> LimitsConfig:
        """The same as an agent reads it."""
        return LimitsConfig(**msgspec.structs.asdict(self))


class HeatTrace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device that draws constant watts comes to ``ambient_c + degrees_per_watt * watts``, exponentially.

    ``time_constant_s``: after that time 63 % of the way there. Watts are idle and training ones; charging does not
    count.
    """

    ambient_c: _Celsius = 25.0
    degrees_per_watt: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
    time_constant_s: _Above0 = 300.0


class Heat:
    """The temperature of one device; at the start it is at rest."""

    __slots__ = ("_at_s", "_c", "_target_c", "_trace")

    def __init__(self, trace: HeatTrace) -> None:
        self._trace, self._at_s = trace, 0.0
        self._c = self._target_c = trace.ambient_c

    def begin(self, watts: float) -> None:
        """At the start it has drawn these watts for long."""
        self.set_watts(0.0, watts)
        self._c = self._target_c

    def celsius(self, now_s: float) -> float:
        """How warm it is, now or at any time since the watts changed."""
        share = math.exp(-(now_s - self._at_s) / self._trace.time_constant_s)
        return self._target_c + (self._c - self._target_c) * share

    def set_watts(self, now_s: float, watts: float) -> None:
        """From now on it draws so much."""
        self._c, self._at_s = self.celsius(now_s), now_s
        self._target_c = self._trace.ambient_c + self._trace.degrees_per_watt * watts
