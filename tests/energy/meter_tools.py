"""Clock and sensors for tests of the meter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.sensors.base import Rail, Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from energy.errors import SensorError
    from energy.metering.meter import Meter


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Power:
    """Watts as a function of time, which may break."""

    def __init__(self, clock: Clock, watts: Callable[[float], float], name: str = "board-power", **options) -> None:
        self.source = Source(name, options.get("scope", "board"), options.get("quality", "power"), f"all of {name}")
        self.domain = options.get("domain", "system")
        self.interval_s = options.get("interval_s", 0.1)
        self.rails = (Rail(f"{name} in", self.source.scope, "watts", limit_watts=100.0),)
        self.watts, self.clock = watts, clock
        self.fault: SensorError | None = None
        self.closed = self.reads = 0

    def read(self) -> tuple[float, ...]:
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        return (self.watts(self.clock()),)

    def close(self) -> None:
        self.closed += 1


class Counter(Power):
    """Joules that grow by ``watts`` per second; modelled if so labelled."""

    def __init__(self, clock: Clock, watts: float, name: str = "package-counter", **options) -> None:
        super().__init__(clock, lambda now: (watts * now) % self.wraps_at, name, **{"quality": "counter"} | options)
        self.wraps_at = options.get("wraps_at", 1e9)
        self.rails = (Rail(f"{name} in", self.source.scope, "joules", wraps_at=options.get("wraps_at")),)


def pass_time(meter: Meter, clock: Clock, seconds: float, step_s: float = 0.1) -> None:
    """Samples the meter through some seconds."""
    end = clock.now + seconds
    while clock.now < end - 1e-9:
        clock.now = min(clock.now + step_s, end)
        meter.sample()
