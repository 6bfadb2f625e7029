"""Idle baselines: which stretches make one, and for which windows."""

from __future__ import annotations

import math

import pytest

from energy.metering.conditions import Conditions
from energy.metering.meter import Meter
from tests.energy.meter_tools import Clock, Counter, Power, pass_time

CALM = Conditions(temperature_c=40.0, throttled=(), events={}, clocks_hz={"policy0": 1_500_000_000}, power_mode="15W")


def test_idle_baseline_is_the_mean_of_before_and_after() -> None:
    """Net joules use the idle stretches on both sides as soon as both are known."""
    clock = Clock()
    level = [2.0]
    meter = Meter([[Power(clock, lambda _: level[0])]], clock=clock)
    with meter.open("idle", idle=True):
        pass_time(meter, clock, 5.0)
    level[0] = 10.0
    meter.sample()
    with meter.open("work") as window:
        pass_time(meter, clock, 10.0)
    level[0] = 4.0
    clock.now += 0.1
    meter.sample()
    first = window.close()
    assert first.idle_watts == pytest.approx(2.0)
    with meter.open("idle", idle=True):
        pass_time(meter, clock, 5.0)
    both = meter.rebased(first)
    assert both.idle_watts == pytest.approx(3.0)
    assert both.joules == first.joules
    assert both.net_joules == pytest.approx((first.joules or 0.0) - 30.0)


def idle(meter: Meter, clock: Clock, seconds: float, step_s: float = 0.1):
    with meter.open("idle", idle=True) as window:
        pass_time(meter, clock, seconds, step_s)
    return window.close()


def work(meter: Meter, clock: Clock) -> float | None:
    with meter.open("work") as window:
        pass_time(meter, clock, 5.0)
    return window.close().idle_watts


@pytest.mark.parametrize(("interval_s", "short_s"), [(0.1, 1.5), (1.0, 3.0)])
def test_an_idle_stretch_that_is_too_short_replaces_no_good_one(interval_s: float, short_s: float) -> None:
    """Less than 2 s, or than 5 updates of the sensor, is no baseline; the last good one stays in use."""
    clock = Clock()
    level = [2.0]
    meter = Meter([[Power(clock, lambda _: level[0], interval_s=interval_s)]], clock=clock)
    idle(meter, clock, 8.0)
    level[0] = 6.0
    pass_time(meter, clock, 2.0)
    assert idle(meter, clock, short_s).joules is not None
    assert work(meter, clock) == pytest.approx(2.0, rel=0.2)
    idle(meter, clock, meter.least_idle_s)
    assert work(meter, clock) == pytest.approx(6.0)


def test_a_doubtful_idle_stretch_is_no_baseline() -> None:
    """Nor is one from an hour ago: rather none than a wrong one."""
    clock = Clock()
    now = [CALM]
    meter = Meter([[Power(clock, lambda now: 2.0 + now % 0.1)]], clock=clock, conditions=lambda: now[0])
    now[0] = CALM._replace(throttled=("under-voltage",))
    idle(meter, clock, 5.0)
    assert work(meter, clock) is None
    now[0] = CALM
    pass_time(meter, clock, 1.0)
    idle(meter, clock, 5.0)
    clock.now += 600.0
    assert work(meter, clock) == pytest.approx(2.0, abs=0.2)
    clock.now += 3600.0
    assert work(meter, clock) is None


def test_sparse_readings_are_enough_for_an_idle_stretch() -> None:
    """One reading in 5 s tells the mean of a minute, as an agent takes it between jobs."""
    clock = Clock()
    meter = Meter([[Power(clock, lambda now: 2.0 + 0.01 * math.sin(now))]], clock=clock)
    assert idle(meter, clock, 60.0, 5.0).valid
    assert work(meter, clock) == pytest.approx(2.0, abs=0.02)


def test_a_coarse_counter_needs_as_many_counts() -> None:
    """A battery gauge that moved twice within a minute says nothing of idle power."""
    clock = Clock()
    battery = Counter(clock, 5.0, "battery", quality="coarse", interval_s=5.0)
    battery.watts = lambda now: 100.0 * int(now * 5.0 / 100.0)  # one count in 20 s
    meter = Meter([[battery]], clock=clock)
    idle(meter, clock, 60.0, 5.0)
    assert not meter._idle
    idle(meter, clock, 200.0, 5.0)
    assert meter._idle[0].watts == pytest.approx(5.0, rel=0.15)
