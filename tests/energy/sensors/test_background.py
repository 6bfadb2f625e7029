"""Sensors that take their time, read by a thread."""

from __future__ import annotations

import threading
import time

import pytest

from energy.errors import AwaitedError, SensorError
from energy.metering.meter import Meter
from energy.sensors.background import Background, wrapped
from energy.sensors.base import Rail, Source
from tests.energy.meter_tools import Clock, Power


class Slow:
    """Watts that take 0.3 s to read; ``fault`` is raised in their place."""

    slow = True

    def __init__(self, took_s: float = 0.3) -> None:
        self.source = Source("slow", "board", "power", "all of it")
        self.domain, self.interval_s = "system", 0.1
        self.rails = (Rail("in", "board", "watts", limit_watts=100.0),)
        self.took_s = took_s
        self.fault: Exception | None = None
        self.reads = self.closed = 0
        self.readers: set[str] = set()

    def read(self) -> tuple[float, ...]:
        self.readers.add(threading.current_thread().name)
        time.sleep(self.took_s)
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        return (5.0,)

    def close(self) -> None:
        self.closed += 1


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def can_read(sensor: Background) -> bool:
    try:
        return sensor.read() == (5.0,)
    except SensorError:
        return False


def test_the_caller_never_waits_for_a_slow_sensor() -> None:
    """The first reading comes later, the newest at once with its age, always out of the same other thread."""
    slow = Slow()
    sensor = Background(slow)
    with pytest.raises(AwaitedError, match="awaited"):
        sensor.read()
    assert slow.reads == 0  # it was not waited for
    wait_until(lambda: can_read(sensor))
    assert 0.1 <= sensor.age_s < 5.0
    reads = slow.reads
    for _ in range(100):
        assert sensor.read() == (5.0,)
    assert slow.reads - reads <= 1
    sensor.close()
    assert slow.closed == 1
    assert slow.readers == {"energy-slow"}


def test_joules_are_those_of_a_sensor_that_is_read_directly() -> None:
    """A meter counts readings once, at the time they were taken."""
    meter = Meter(wrapped([[Slow(0.05)]]))
    assert meter.source is not None  # a sensor that is there already is waited for a moment
    with meter.open("work") as window:
        for _ in range(20):
            time.sleep(0.02)
            meter.sample()
    result = window.close()
    assert result.joules == pytest.approx(5.0 * result.seconds)
    assert result.samples <= 6
    meter.close()


def test_nothing_is_read_while_nobody_asks() -> None:
    """The thread sleeps soon after the last question, and goes on with the next."""
    slow = Slow(0.0)
    sensor = Background(slow)
    wait_until(lambda: can_read(sensor))
    time.sleep(0.3)
    reads = slow.reads
    time.sleep(0.3)
    assert slow.reads == reads
    sensor.read()
    wait_until(lambda: slow.reads > reads)
    sensor.close()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(SensorError("vanished", "unplugged"), "vanished"), (ValueError("int too large"), "implausible")],
)
def test_what_the_sensor_raises_is_told_until_it_is_back(fault: Exception, kind: str) -> None:
    """A fault, or an exception nobody thought of, is the fault of this sensor; the thread lives on."""
    slow = Slow(0.0)
    sensor = Background(slow)
    wait_until(lambda: can_read(sensor))
    slow.fault = fault
    wait_until(lambda: not can_read(sensor))
    with pytest.raises(SensorError, match=str(fault)) as raised:
        sensor.read()
    assert raised.value.fault == kind
    slow.fault = None
    wait_until(lambda: can_read(sensor))
    sensor.close()


def test_a_reading_that_hangs_is_frozen() -> None:
    """A sensor that does not come back from a reading is no sensor any more."""
    clock = Clock()
    release = threading.Event()
    slow = Slow(0.0)
    sensor = Background(slow, wait_s=5.0, clock=clock)
    assert can_read(sensor)
    slow.read = lambda: (release.wait(10.0), 5.0)[1:]
    clock.now += 1.0
    sensor.read()
    clock.now += 20.0
    with pytest.raises(SensorError, match=r"not answered for 2[01] s") as raised:
        sensor.read()
    assert raised.value.fault == "frozen"
    release.set()
    sensor.close()


def test_after_a_long_pause_a_fresh_reading_is_awaited() -> None:
    """What was read an hour ago, or failed then, says nothing about now."""
    clock = Clock()
    slow = Slow(0.0)
    sensor = Background(slow, wait_s=5.0, clock=clock)
    assert can_read(sensor)
    clock.now += 3600.0
    wait_until(lambda: sensor._asleep)
    with pytest.raises(AwaitedError):
        sensor.read()
    wait_until(lambda: can_read(sensor))
    slow.fault = SensorError("vanished", "unplugged")
    wait_until(lambda: (setattr(clock, "now", clock.now + 0.01), not can_read(sensor))[1])
    clock.now += 60.0
    wait_until(lambda: sensor._asleep)
    slow.fault = None
    with pytest.raises(AwaitedError):
        sensor.read()
    wait_until(lambda: can_read(sensor))
    sensor.close()


def test_only_slow_sensors_are_wrapped_and_each_once() -> None:
    """Files of the kernel are read directly; a sensor of two ways has one thread."""
    slow, quick = Slow(0.0), Power(Clock(), lambda _: 5.0)
    ways = wrapped([[slow, quick], [slow], [quick]])
    assert isinstance(ways[0][0], Background)
    assert ways == [(ways[0][0], quick), (ways[0][0],), (quick,)]
    ways[0][0].close()


def test_a_meter_takes_up_a_sensor_as_soon_as_its_first_reading_is_there() -> None:
    """Joules are another sensor's until then, without half a minute's delay, and it says so."""
    slow, clock = Slow(0.0), Clock()
    gate = threading.Event()
    real = slow.read
    slow.read = lambda: (gate.wait(5.0), *real())[1:]
    said: list[str] = []
    other = Power(clock, lambda _: 2.0, "rails")
    meter = Meter([[Background(slow)], [other]], clock=clock, on_change=said.append)
    assert meter.source == other.source
    assert "awaited" in said[0]
    gate.set()
    wait_until(lambda: slow.reads)

    def taken_up() -> bool:
        clock.now += 1.5
        meter.sample()
        return meter.source == slow.source

    wait_until(taken_up)
    meter.close()
    assert slow.closed == 1
