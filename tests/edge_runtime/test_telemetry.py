"""Telemetry: values or None, never a guess."""

from __future__ import annotations

import time
from types import SimpleNamespace

import psutil
import pytest

from edge_runtime import messages, telemetry


def test_measurement_fits_a_message():
    """Everything measured on this machine passes the wire."""
    measured = telemetry.measure(time.monotonic() - 1, 10, 20)
    assert messages.decode_from_device(messages.encode(measured)) == measured
    assert measured.uptime_s >= 1
    assert (measured.link_sent_bytes, measured.link_received_bytes) == (10, 20)


def test_a_device_without_sensors_says_none(monkeypatch):
    """No battery and no thermometer are None, not zero."""
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    measured = telemetry.measure(0.0, 0, 0)
    assert measured.temperature_c is measured.battery_percent is measured.on_external_power is None


@pytest.mark.parametrize("error", [OSError(5, "I/O"), ValueError("not a number")])
def test_a_sensor_that_refuses_is_none(monkeypatch, error):
    """A sensor whose file cannot be read does not end the agent."""

    def broken():
        raise error

    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", broken, raising=False)
    measured = telemetry.measure(0.0, 0, 0)
    assert measured.temperature_c is measured.battery_percent is None


def test_the_hottest_sensor_counts(monkeypatch):
    """Of several thermometers the hottest is told; one without a reading is left out."""
    zones = {
        "cpu": [SimpleNamespace(current=41.0), SimpleNamespace(current=None)],
        "gpu": [SimpleNamespace(current=55.5)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: zones, raising=False)
    assert telemetry.temperature_c() == 55.5


def test_the_kernel_can_be_asked_about_the_clock():
    """Clock synchronisation is true, false or unknown, and asking changes nothing."""
    assert telemetry.clock_synchronised() in (True, False, None)
