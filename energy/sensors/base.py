"""What every sensor of power or energy looks like, and what a number must carry.

A sensor is made by the ``probe`` function of its file, which makes a real read first: an interface that is there and
answers nothing is no sensor. Files of the system are looked up below ``root`` (``/``), so that tests can bring a tree
read off a real board.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeAlias

Scope: TypeAlias = Literal["board", "module", "rail", "package", "modelled"]
Quality: TypeAlias = Literal["counter", "power", "coarse", "modelled"]
Domain: TypeAlias = Literal["system", "cpu", "gpu"]
Unit: TypeAlias = Literal["watts", "joules"]


class Rail(NamedTuple):
    """One figure of a sensor.

    ``unit``: ``watts`` is power now, ``joules`` a counter that only grows, and starts again from 0 after ``wraps_at``
    joules (None: it does not wrap). ``in_total``: part of the sensor's total; a rail that feeds others is in the total
    and they are not, or the other way round, never both. ``limit_watts``: more than this is implausible.
    ``resolution``: the smallest step of a reading in its unit, where the sensor knows it.
    """

    name: str
    scope: Scope
    unit: Unit
    in_total: bool = True
    wraps_at: float | None = None
    limit_watts: float = 2000.0
    resolution: float | None = None


class Source(NamedTuple):
    """Where joules come from; goes with every figure. ``covers`` says in words what is in them, and what is not."""

    sensor: str
    scope: Scope
    quality: Quality
    covers: str

    @property
    def modelled(self) -> bool:
        """Whether nothing was measured."""
        return self.quality == "modelled"

    @property
    def label(self) -> str:
        """Sensor and scope, as ``rapl (package)``; of a model its name alone."""
        return self.sensor if self.scope == self.sensor else f"{self.sensor} ({self.scope})"


class Sensor(Protocol):
    """One way to know what this machine draws. Not for several threads at a time.

    Attributes:
        source: name, scope and quality of the total.
        domain: what the total is of; a sensor of the whole system is preferred, else those of CPU and GPU are added.
        rails: what :meth:`read` gives, in this order; at least one is in the total.
        interval_s: how often the hardware has something new to say, so how often reading pays.

    A sensor may have more: ``accuracy`` (a fraction, as its maker says), ``slow`` (reading may take longer than 10 ms;
    see :mod:`energy.sensors.background`), ``frozen_s`` (a coarse one that says the same for longer is broken), and
    ``age_s`` (how old what :meth:`read` gave last was by then; such a sensor may give one reading several times, and
    may change ``rails`` with its first one).
    """

    source: Source
    domain: Domain
    rails: tuple[Rail, ...]
    interval_s: float

    def read(self) -> tuple[float, ...]:
        """One value per rail, watts or joules by its unit.

        Raises:
            SensorError: it cannot be read now.
        """
        ...

    def close(self) -> None:
        """Frees what the sensor holds."""
        ...
