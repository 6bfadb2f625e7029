"""The meter: joules of named windows of time, from the best sensor that can be read, with all that speaks against them.

It starts no thread; whoever owns it calls :meth:`Meter.sample` every ``interval_s``, or lets the `Sampler` do
so. Counters are subtracted, power is integrated by trapezoids with the edges of windows interpolated. When
a sensor fails, the next best way takes over and says so. Joules of a window that a model took over count as modelled
from its start, so that modelled joules never stand where measured ones are meant.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from energy.errors import AwaitedError, SensorError
from energy.metering.marks import Watch
from energy.metering.way import Way
from energy.metering.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from energy.metering.conditions import Conditions
    from energy.metering.measurement import Measurement
    from energy.sensors.base import Sensor, Source

RETRY_SOON_S, RETRY_FIRST_S, RETRY_LIMIT_S = 1.0, 30.0, 3600.0
MOST_IDLE = 64  # idle stretches that are remembered
IDLE_S, IDLE_UPDATES = 2.0, 5  # the least that makes a baseline
ROUNDING_S = 1e-6
IDLE_AGE_S = 900.0  # farther away from a window it is none


class _Idle(NamedTuple):
    started_s: float
    ended_s: float
    watts: float
    source: Source


class Meter:
    """Measures with the first of ``ways`` that can be read.

    A better way that failed is tried again, after 30 s and then ever more seldom, while no window is open: a window
    changes its source only when it must.

    Args:
        ways: best first, as :func:`energy.sensors.discovery.ranked` gives them; each is a set of sensors whose totals
            add up. The meter closes them.
        clock: monotonic seconds.
        conditions: reads throttling, clocks and power mode; None: windows are not marked by them.
        on_change: told in one line when the source changes or is lost.

    Attributes:
        source: of the way in use; None: nothing can be read.
        interval_s: how often sampling pays, in seconds.
        lock: held by every method; replace it before other threads call.
    """

    def __init__(
        self,
        ways: Sequence[Sequence[Sensor]],
        *,
        clock: Callable[[], float] = time.monotonic,
        conditions: Callable[[], Conditions] | None = None,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        self.clock = clock
        self.lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._ways = [Way(sensors) for sensors in ways if sensors]
        self._retry_s = [0.0] * len(self._ways)
        self._delay_s = [RETRY_FIRST_S] * len(self._ways)
        self._way: Way | None = None
        self._rank = len(self._ways)
        self._on_change = on_change
        self._watch = Watch(conditions, clock)
        self._windows: list[Window] = []
        self._idle: deque[_Idle] = deque(maxlen=MOST_IDLE)
        self._take_best("")

    @property
    def source(self) -> Source | None:
        return None if self._way is None else self._way.source

    @property
    def interval_s(self) -> float:
        return 1.0 if self._way is None else self._way.interval_s

    @property
    def least_idle_s(self) -> float:
        """How long an idle stretch has to be for a baseline, a little more than the least."""
        return max(IDLE_S, (IDLE_UPDATES + 1) * self.interval_s)

    @property
    def watts(self) -> float | None:
        """Total power at the last reading; of a counter the mean since the reading before. None if unknown."""
        if self._way is None:
            return None
        return sum(part.watts for part in self._way.parts)

    @property
    def rail_watts(self) -> dict[str, float]:
        """Power of every rail, as :attr:`watts`."""
        if self._way is None:
            return {}
        return dict(zip(self._way.names, (track.watts for track in self._way.tracks), strict=True))

    @property
    def conditions(self) -> Conditions | None:
        """The last that were read."""
        return self._watch.latest

    def sample(self) -> None:
        """Takes one reading. On a fault the next best way takes over; open windows and ``on_change`` are told."""
        with self.lock:
            self._sample(edge=False)

    def open(self, name: str, *, idle: bool = False) -> Window:
        """Begins a window; there may be many, nested or not.

        An ``idle`` one is a baseline for those beside it, if it is long enough (see :meth:`rebased`); it may be sampled
        sparsely.
        """
        with self.lock:
            self._sample(edge=True)
            window = Window(self, name, self.clock(), idle=idle, conditions=self._watch.latest)
            window.enter(self._way, window.started_s)
            if self._way is None:
                window.note("no sensor of power or energy could be read")
            self._windows.append(window)
            return window

    def rebased(self, measurement: Measurement) -> Measurement:
        """The same with the idle baseline known by now: the mean of the nearest good idle stretches before and after.

        A stretch is good if it lasted 2 s and 5 updates of its sensor or longer and nothing spoke against it; one that
        is not leaves the last good one in place. Only stretches of the same source count that lie within 15 minutes of
        the measurement; with one of the two sides the baseline is that one.
        """
        with self.lock:
            return self._rebased(measurement)

    def close(self) -> None:
        """Closes the sensors; windows that are still open know nothing more."""
        with self.lock:
            for window in list(self._windows):
                window.close()
            self._way = None
            self._rank = len(self._ways)
            self._retry_s = [float("inf")] * len(self._ways)
            for sensor in {id(p.sensor): p.sensor for way in self._ways for p in way.parts}.values():
                sensor.close()

    def finish(self, window: Window) -> Measurement:
        """What :meth:`Window.close` does."""
        with self.lock:
            end_s = window.ended_s = self.clock()
            self._sample(edge=True)
            self._windows.remove(window)
            measurement = window.result(end_s)
            source = measurement.source
            if window.idle:
                long = measurement.seconds >= IDLE_S - ROUNDING_S and window.updates >= IDLE_UPDATES
                if measurement.valid and measurement.joules is not None and source is not None and long:
                    watts = measurement.joules / measurement.seconds
                    self._idle.append(_Idle(window.started_s, end_s, watts, source))
                return measurement
            return self._rebased(measurement)

    def _rebased(self, measurement: Measurement) -> Measurement:
        end_s = measurement.started_s + measurement.seconds
        earliest_s, latest_s = measurement.started_s - IDLE_AGE_S, end_s + IDLE_AGE_S
        same = [
            idle
            for idle in self._idle
            if idle.source == measurement.source and idle.ended_s >= earliest_s and idle.started_s <= latest_s
        ]
        before = max((i for i in same if i.ended_s <= measurement.started_s), key=lambda i: i.ended_s, default=None)
        after = min((i for i in same if i.started_s >= end_s), key=lambda i: i.started_s, default=None)
        watts = [idle.watts for idle in (before, after) if idle is not None]
        return measurement._replace(idle_watts=sum(watts) / len(watts) if watts else None)

    def _sample(self, *, edge: bool) -> None:
        if self._way is None or not self._windows:
            self._try_better()
        self._read(edge=edge)
        for window in self._windows:
            if window.span is not None:
                window.span.update(window.ended_s)
        if (self._windows or edge) and self._watch.look(edge=edge) and self._watch.latest is not None:
            for window in self._windows:
                window.marks.see(self._watch.latest)

    def _read(self, *, edge: bool) -> None:
        if self._way is None:
            return
        try:
            notes = self._way.read(self.clock, everything=edge)
        except SensorError as error:
            self._fail(self._way, error)
            return
        for text in notes:
            for window in self._windows:
                window.note(text)

    def _fail(self, failed: Way, error: SensorError) -> None:
        if isinstance(error, AwaitedError):
            self._retry_s[self._rank] = self.clock() + RETRY_SOON_S
        else:
            self._put_off(self._rank)
        self._way, self._rank = None, len(self._ways)
        told = self._take_best(f"{failed.source.sensor} failed: {error}")
        now_s = self.clock()
        for window in self._windows:
            window.note(told)
            if window.ended_s > now_s:  # a way that takes over after the end of a window is no part of it
                window.leave(now_s)
                window.enter(self._way, now_s)

    def _try_better(self) -> None:
        now_s = self.clock()
        for rank in range(self._rank):
            if now_s >= self._retry_s[rank] and self._start(rank) is None:
                told = f"measures with {_named(self._ways[rank])} again"
                self._say(told)
                for window in self._windows:  # those that had no sensor; what was drawn meanwhile is unknown
                    if window.span is None and window.ended_s > now_s:
                        window.note(told)
                        window.enter(self._way, self.clock())
                return

    def _take_best(self, why: str) -> str:
        """Starts the best way that can be; says which, and why the others not."""
        reasons = [why] if why else []
        now_s = self.clock()
        for rank in range(len(self._ways)):
            if now_s < self._retry_s[rank]:
                continue
            error = self._start(rank)
            if error is None:
                text = "; ".join([*reasons, f"goes on with {_named(self._ways[rank])}"])
                if reasons:
                    self._say(text)
                return text
            reasons.append(str(error))
        text = "; ".join([*reasons, "no sensor of power or energy can be read, so joules are unknown"])
        self._say(text)
        return text

    def _put_off(self, rank: int) -> None:
        self._retry_s[rank] = self.clock() + self._delay_s[rank]
        self._delay_s[rank] = min(2 * self._delay_s[rank], RETRY_LIMIT_S)

    def _start(self, rank: int) -> SensorError | None:
        way = self._ways[rank]
        try:
            way.start(self.clock)
        except AwaitedError as error:
            self._retry_s[rank] = self.clock() + RETRY_SOON_S
            return error
        except SensorError as error:
            self._put_off(rank)
            return error
        self._way, self._rank = way, rank
        return None

    def _say(self, text: str) -> None:
        if self._on_change is not None:
            self._on_change(text)


def _named(way: Way) -> str:
    return f"{way.source.label}: {way.source.covers}"
