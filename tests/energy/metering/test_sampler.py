"""The thread that samples a meter."""

from __future__ import annotations

import threading
import time

import pytest

from energy.errors import EnergyError, SensorError
from energy.metering.meter import Meter
from energy.metering.sampler import Sampler
from tests.energy.meter_tools import Power


def wait_for(said: list[str]) -> None:
    for _ in range(1000):
        if said:
            return
        time.sleep(0.005)
    raise AssertionError("nothing was said")


def test_windows_are_opened_from_other_threads_while_it_samples() -> None:
    """Windows of several threads are right while the sampler reads."""
    sensor = Power(time.monotonic, lambda _: 5.0, interval_s=0.01)
    meter = Meter([[sensor]])
    results = []

    def work() -> None:
        for _ in range(3):
            with meter.open("part") as window:
                time.sleep(0.05)
            results.append(window.close())

    with Sampler(meter, 0.01):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reads = sensor.reads
    assert len(results) == 9
    for result in results:
        assert result.joules == pytest.approx(5.0 * result.seconds)
    time.sleep(0.03)
    assert sensor.reads == reads  # it ended


def test_a_sensor_that_breaks_in_an_unknown_way_does_not_end_the_sampling() -> None:
    """An exception nobody thought of is that sensor's fault: the next one takes over, and it is said which it was."""
    broken, good = Power(time.monotonic, lambda _: 5.0, interval_s=0.01), Power(time.monotonic, lambda _: 3.0, "rail")
    said: list[str] = []
    meter = Meter([[broken], [good]], on_change=said.append)
    with Sampler(meter, 0.01):
        broken.fault = OverflowError("cannot convert float infinity to integer")
        wait_for(said)
        with meter.open("after") as window:
            time.sleep(0.25)
    assert "OverflowError" in said[0]
    assert window.close().joules == pytest.approx(3.0 * window.close().seconds)


def test_a_sampler_that_died_says_so_when_it_is_stopped() -> None:
    """Figures without readings do not pass for good ones."""
    said: list[str] = []

    def fail(text: str) -> None:
        said.append(text)
        raise RuntimeError("the disk of the log is full")

    sensor = Power(time.monotonic, lambda _: 5.0)
    sampler = Sampler(Meter([[sensor]], on_change=fail), 0.01)
    sampler.start()
    sensor.fault = SensorError("vanished", "gone")
    wait_for(said)
    with pytest.raises(EnergyError, match=r"ended early .*disk of the log is full"):
        sampler.stop()
    sampler.stop()


def test_sampler_paces_itself_by_the_sensor_at_most_ten_times_a_second() -> None:
    """A fast sensor is not read more often than pays."""
    sensor = Power(time.monotonic, lambda _: 5.0, interval_s=0.001)
    with Sampler(Meter([[sensor]])):
        time.sleep(0.35)
    assert sensor.reads <= 5
