"""The idle power of this device: a few seconds of readings now and then, while there is no job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.agent.job_energy import Idle

if TYPE_CHECKING:
    from edge_runtime.transport.loop import Loop, Timer
    from energy.metering.meter import Meter
    from energy.metering.window import Window

PAUSE_S = 60.0  # between two stretches
STRETCH_S, STRETCH_INTERVALS = 3.0, 8.0  # how long one is: seconds, or intervals of a slower sensor
LEAST_S = 2.0  # one that a job ended earlier says nothing of a machine that idles
KEPT_S = 600.0  # an older one neither: the device may be warmer, plugged in, or busy with something else by now
FASTEST_S = 0.1


class IdlePower:
    """Remembers the last good stretch: long enough, without a gap, throttling or another fault of its sensor."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._meter: Meter | None = None
        self._window: Window | None = None
        self._timer: Timer | None = None
        self._next_s = 0.0
        self._ended_s = 0.0
        self._last: Idle | None = None

    @property
    def measures(self) -> bool:
        """Whether a stretch is being measured now."""
        return self._window is not None

    def begin(self, meter: Meter) -> None:
        """There is no job: measures for a while, if it is time for that."""
        if self._window is None and self._loop.now() >= self._next_s and meter.source is not None:
            self._meter, self._window = meter, meter.open("idle", idle=True)
            self._timer = self._loop.call_later(self._interval_s(meter), self._sample)

    def end(self) -> None:
        """A job begins, or the sensors are closed."""
        if self._timer is not None:
            self._timer.cancel()
        if self._window is None:
            return
        found, self._window, self._meter = self._window.close(), None, None
        if found.valid and found.seconds >= LEAST_S and found.joules is not None and found.source is not None:
            self._ended_s = self._loop.now()
            self._last = Idle(found.source.sensor, found.joules / found.seconds)

    def now(self) -> Idle | None:
        """Of the last good stretch; None if there was none for a while."""
        return self._last if self._loop.now() - self._ended_s <= KEPT_S else None

    def _sample(self) -> None:
        meter, window = self._meter, self._window
        if meter is None or window is None:
            return
        interval_s = self._interval_s(meter)
        if self._loop.now() - window.started_s >= max(STRETCH_S, STRETCH_INTERVALS * interval_s):
            self.end()
            self._next_s = self._loop.now() + PAUSE_S
            return
        meter.sample()
        self._timer = self._loop.call_later(interval_s, self._sample)

    @staticmethod
    def _interval_s(meter: Meter) -> float:
        return max(meter.interval_s, FASTEST_S)
