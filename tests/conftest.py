"""Fixtures every part of the suite may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pytest_report_header() -> str:
    """Says which suite runs."""
    return (
        "suite: full (long schedules)"
        if os.environ.get("EDGE_FULL")
        else "suite: default; scripts/test --full for more"
    )


@pytest.fixture(scope="session")
def mosquitto_program() -> str:
    """Path of mosquitto; the test skips, saying so, where it is not installed."""
    broker = pytest.importorskip("coordinator.broker")
    program = broker.mosquitto_path()
    if program is None:
        message = "mosquitto is not installed (apt-get install mosquitto)"
        if os.environ.get("EDGE_REQUIRE_MOSQUITTO"):
            pytest.fail(message)
        pytest.skip(message)
    return program


@pytest.fixture
def mosquitto(mosquitto_program: str, tmp_path: Path) -> Iterator:
    """A running mosquitto with its URL and password file."""
    from coordinator.broker import MosquittoBroker, password_file, start_broker

    folder = tmp_path / "broker"
    broker, url = start_broker(folder)
    assert isinstance(broker, MosquittoBroker), mosquitto_program
    broker.url, broker.password_file = url, password_file(folder)
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the long schedules run."""
    return bool(os.environ.get("EDGE_FULL"))
