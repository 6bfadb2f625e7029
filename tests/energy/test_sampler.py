"""The thread that samples a meter."""

from __future__ import annotations

import threading
import time

import pytest

from energy.meter import Meter
from energy.sampler import Sampler
from tests.energy.meter_tools import Power


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


def test_sampler_paces_itself_by_the_sensor_at_most_ten_times_a_second() -> None:
    """A fast sensor is not read more often than pays."""
    sensor = Power(time.monotonic, lambda _: 5.0, interval_s=0.001)
    with Sampler(Meter([[sensor]])):
        time.sleep(0.35)
    assert sensor.reads <= 5
