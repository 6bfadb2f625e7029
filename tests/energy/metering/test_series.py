"""The running integral of one rail."""

from __future__ import annotations

import pytest

from energy.errors import SensorError
from energy.metering.series import Track
from energy.sensors.base import Rail

POWER = Rail("in", "board", "watts", limit_watts=50.0)
COUNTER = Rail("in", "package", "joules", wraps_at=1000.0, limit_watts=50.0)


def test_time_between_two_readings_is_interpolated() -> None:
    """Within a trapezoid joules follow the slanting power, within a counter the straight line."""
    power, counter = Track(POWER), Track(COUNTER)
    for at_s, watts, joules in ((0.0, 0.0, 0.0), (2.0, 10.0, 10.0)):
        power.add(at_s, watts)
        counter.add(at_s, joules)
    assert [power.at(at_s) for at_s in (0.0, 1.0, 2.0, 3.0)] == pytest.approx([0.0, 2.5, 10.0, 20.0])
    assert [counter.at(at_s) for at_s in (0.0, 1.0, 2.0, 3.0)] == pytest.approx([0.0, 5.0, 10.0, 15.0])


def test_counter_wraps_once_and_jumps_never() -> None:
    """A fall is a wrap where the counter wraps; a jump beyond any power is refused."""
    track = Track(COUNTER)
    track.add(0.0, 990.0)
    track.check(1.0, 10.0)
    track.add(1.0, 10.0)
    assert track.joules == pytest.approx(20.0)
    with pytest.raises(SensorError, match="grew by 500 J"):
        track.check(2.0, 510.0)
    endless = Track(Rail("in", "package", "joules"))
    endless.add(0.0, 5.0)
    with pytest.raises(SensorError, match="fell"):
        endless.check(1.0, 4.0)


def test_reading_that_is_not_later_is_left_out() -> None:
    """Two readings of the same moment are one."""
    track = Track(POWER)
    for at_s in (0.0, 1.0, 1.0):
        track.add(at_s, 5.0)
    assert track.joules == pytest.approx(5.0)


def test_resolution_is_what_the_sensor_says_or_enough_changes_show() -> None:
    """A single step of load is not taken for the resolution."""
    track = Track(POWER)
    track.add(0.0, 5.0)
    track.add(1.0, 10.0)
    assert track.resolution == 0.0
    for second in range(2, 20):
        track.add(second, 10.0 + 0.04 * (second % 3))
    assert track.resolution == pytest.approx(0.04)
    assert Track(POWER._replace(resolution=1.0)).resolution == 1.0
