"""Bursts in windows of a meter."""

from __future__ import annotations

import pytest

from energy.errors import ProfileError, SensorError
from energy.metering.meter import Meter
from energy.thor.gauge import MeterGauge
from tests.energy.meter_tools import Clock, Power, pass_time


class Stepper:
    """Three steps of a second."""

    steps_per_burst = 3

    def __init__(self, meter: Meter, clock: Clock) -> None:
        self.meter, self.clock = meter, clock

    def run(self, steps: int) -> None:
        pass_time(self.meter, self.clock, steps)


def test_a_profile_has_joules_of_one_sensor_alone() -> None:
    """When another one takes over its joules are left out, and soon the profile ends with both names and a cure."""
    clock = Clock()
    first, second = Power(clock, lambda _: 5.0, "usb-meter"), Power(clock, lambda _: 3.0, "rail", scope="module")
    meter = Meter([[first], [second]], clock=clock)
    gauge = MeterGauge(meter)
    stepper = Stepper(meter, clock)
    assert gauge(stepper).costs["joules"] == pytest.approx(5.0)
    first.fault = SensorError("vanished", "usb-meter was unplugged")
    for _ in range(4):
        assert "joules" not in gauge(stepper).costs
    with pytest.raises(ProfileError, match=r"usb-meter \(board\) failed.* rail \(module\).*--sensor rail"):
        gauge(stepper)
    assert any("rail (module) took over from usb-meter (board)" in problem for problem in gauge.problems)
    assert gauge.idle(0.0) is None
    assert len(gauge.power) == 1


def test_bursts_count_again_when_the_sensor_is_back() -> None:
    """A short absence costs some bursts and no profile."""
    clock = Clock()
    first, second = Power(clock, lambda _: 5.0, "usb-meter"), Power(clock, lambda _: 3.0, "rail", scope="module")
    meter = Meter([[first], [second]], clock=clock)
    gauge = MeterGauge(meter)
    stepper = Stepper(meter, clock)
    first.fault = SensorError("vanished", "usb-meter was unplugged")
    assert "joules" not in gauge(stepper).costs
    first.fault = None
    clock.now += 60.0
    assert gauge(stepper).costs["joules"] == pytest.approx(5.0)
