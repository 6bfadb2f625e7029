"""Telemetry: values or None, never a guess."""

from __future__ import annotations

import time

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
    measured = telemetry.measure(0.0, 0, 0)
    assert measured.battery_percent is measured.on_external_power is None


@pytest.mark.parametrize("error", [OSError(5, "I/O"), ValueError("not a number")])
def test_a_sensor_that_refuses_is_none(monkeypatch, error):
    """A sensor whose file cannot be read does not end the agent."""

    def broken():
        raise error

    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    measured = telemetry.measure(0.0, 0, 0)
    assert measured.battery_percent is None


def test_the_hottest_zone_counts(tmp_path):
    """Of several zones the hottest is told; one without a reading and the constant of a Jetson's power chip are not."""
    for number, (kind, text) in enumerate([("cpu", "41000"), ("gpu", "55500"), ("cv", ""), ("PMIC-Die", "100000")]):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(kind)
        (zone / "temp").write_text(text)
    assert telemetry.temperature_c(tmp_path) == 55.5
    assert telemetry.temperature_c(tmp_path / "none") is None


def test_the_kernel_can_be_asked_about_the_clock():
    """Clock synchronisation is true, false or unknown, and asking changes nothing."""
    assert telemetry.clock_synchronised() in (True, False, None)
