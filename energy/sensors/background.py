"""A slow sensor (a process per reading, a network) read by a thread, so that its reader never waits.

The thread reads while somebody asks: at the sensor's interval, for one and a half intervals after the last question.
So nothing is read that nobody wants, and the reading after a pause is an old one; ``age_s`` says how old.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from energy.errors import AwaitedError, SensorError
from energy.sensors._files import unexpected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from energy.sensors.base import Rail, Sensor

AHEAD = 1.5  # intervals after a question for which the thread goes on by itself
STALE_S, STALE_INTERVALS = 15.0, 5.0
ATTEMPTS, PAUSE_S = 3, 0.1  # as for sensors that are read directly: one hiccup is no broken sensor
FIRST_WAIT_S = 0.2  # for the first reading of a sensor that was read before; one that has to connect is not waited for
PATIENCE_S = 1.0  # how long closing waits for a reading under way; the thread closes the sensor after it


class Background:
    """Stands in for ``sensor``, which belongs to the thread from here on. :meth:`read` takes microseconds.

    Args:
        sensor: is read and closed by the thread alone.
        wait_s: for the first reading; making one takes no longer than that.
        clock: monotonic seconds.

    Attributes:
        age_s: seconds since what :meth:`read` gave last was measured.
    """

    slow = False

    def __init__(self, sensor: Sensor, *, wait_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.source, self.domain, self.interval_s = sensor.source, sensor.domain, sensor.interval_s
        self.rails: tuple[Rail, ...] = sensor.rails
        self.accuracy: float | None = getattr(sensor, "accuracy", None)
        self.frozen_s: float = getattr(sensor, "frozen_s", math.inf)
        self.age_s = 0.0
        self._sensor = sensor
        self._clock = clock
        self._limit_s = max(STALE_S, STALE_INTERVALS * sensor.interval_s)
        self._news = threading.Condition()
        self._ended = False
        self._asked_s = self._waiting_since_s = clock()
        self._asleep = False
        self._answer: tuple[float, ...] | None = None
        self._answer_rails = sensor.rails
        self._answer_s = 0.0
        self._error: SensorError | None = None
        self._thread = threading.Thread(target=self._run, name=f"energy-{sensor.source.sensor}", daemon=True)
        self._thread.start()
        if wait_s > 0:
            with self._news:
                self._news.wait_for(lambda: self._answer is not None or self._error is not None, timeout=wait_s)

    def read(self) -> tuple[float, ...]:
        """The newest reading; see :class:`energy.sensors.base.Sensor`.

        Raises:
            AwaitedError: there is none yet, or only one from before a long pause.
            SensorError: what the sensor said last; ``frozen`` if it has not answered for long.
        """
        with self._news:
            now_s = self._asked_s = self._clock()
            if self._asleep:
                self._asleep = False
                self._waiting_since_s = now_s
                if self._error is not None:  # old news, as is what was read before it
                    self._answer = self._error = None
                self._news.notify_all()
            if now_s - self._waiting_since_s > self._limit_s:
                silent_s = now_s - self._waiting_since_s
                raise SensorError("frozen", f"{self.source.sensor} has not answered for {silent_s:.0f} s")
            if self._error is not None:
                raise SensorError(self._error.fault, str(self._error))
            if self._answer is None or now_s - self._answer_s > self._limit_s:
                raise AwaitedError(f"{self.source.sensor}: its first reading is awaited")
            self.age_s = now_s - self._answer_s
            self.rails = self._answer_rails
            return self._answer

    def close(self) -> None:
        """Ends the thread, which closes the sensor; a reading under way is waited for a second at most."""
        with self._news:
            self._ended = True
            self._news.notify_all()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            while self._wait():
                self._read()
        finally:
            self._sensor.close()

    def _wait(self) -> bool:
        """Until the next reading is due; False at the end."""
        with self._news:
            if self._answer is not None or self._error is not None:
                self._news.wait_for(lambda: self._ended, timeout=self._pause_s())
            if not self._ended and self._clock() - self._asked_s > AHEAD * self.interval_s:
                self._asleep = True
                self._news.wait_for(lambda: self._ended or not self._asleep)
            self._waiting_since_s = self._clock()
            return not self._ended

    def _pause_s(self) -> float:
        return max(self._waiting_since_s + self.interval_s - self._clock(), 0.0)

    def _read(self) -> None:
        for attempt in range(ATTEMPTS):
            began_s = self._clock()
            error = None
            try:
                values = self._believed()
            except SensorError as raised:
                error = raised
            except Exception as raised:  # noqa: BLE001 - a thread must not die of its sensor
                error = unexpected(self._sensor, raised)
            with self._news:
                if error is None:
                    self._answer, self._answer_rails = values, self._sensor.rails
                    self._answer_s = 0.5 * (began_s + self._clock())
                    self._error = None
                elif error.fault not in ("implausible", "vanished") or attempt == ATTEMPTS - 1:
                    self._error = error
                if error is None or self._error is not None:
                    self._news.notify_all()
                    return
                if self._news.wait_for(lambda: self._ended, timeout=PAUSE_S):
                    return

    def _believed(self) -> tuple[float, ...]:
        values = self._sensor.read()
        for rail, value in zip(self._sensor.rails, values, strict=True):
            limit = rail.limit_watts if rail.unit == "watts" else math.inf
            if not (math.isfinite(value) and 0 <= value <= limit):
                raise SensorError("implausible", f"{rail.name} reads {value:g} {rail.unit}")
        return values


def wrapped(ways: Iterable[Sequence[Sensor]]) -> list[tuple[Sensor, ...]]:
    """The same ways of measuring, with every sensor that is marked ``slow`` read in the background.

    A sensor of several ways gets one thread. Whoever takes them closes these sensors in place of the ones given.
    """
    made: dict[int, Sensor] = {}
    result = []
    for way in ways:
        for sensor in way:
            if id(sensor) not in made:
                wait_s = FIRST_WAIT_S if getattr(sensor, "connected", True) else 0.0
                made[id(sensor)] = Background(sensor, wait_s=wait_s) if getattr(sensor, "slow", False) else sensor
        result.append(tuple(made[id(sensor)] for sensor in way))
    return result
