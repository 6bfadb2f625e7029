"""What the store and the log learn of the devices."""

from __future__ import annotations

import logging

import pytest

from coordinator.device_news import BEAT_SAVE_S, LINES_AT_ONCE, ROWS_AT_ONCE, DeviceNews
from coordinator.errors import StoreError
from coordinator.fleet import Fleet
from edge_runtime.messages import DeviceState


class Rows:
    """Remembers which devices were stored, and can be full."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.full = False

    def save(self, rows: list) -> None:
        if self.full:
            raise StoreError("full")
        self.batches.append([row.device for row in rows])


def news_of(count: int) -> tuple[DeviceNews, Rows, list[str]]:
    """News of so many devices that have just come."""
    fleet, rows = Fleet(), Rows()
    news = DeviceNews(fleet, rows.save)
    names = [f"d-{number:04d}" for number in range(count)]
    for name in names:
        fleet.announce(0.0, DeviceState(device=name, online=True, session="s", instance=name))
        news.changed(name)
    return news, rows, names


def test_a_change_is_stored_at_once_and_heartbeats_once_a_minute():
    """What a device says of itself all the time does not wear out the disk."""
    news, rows, _ = news_of(1)
    for second in range(121):
        news.beaten("d-0000")
        news.save(float(second))
    assert len(rows.batches) == 1 + 120 // BEAT_SAVE_S
    news.changed("d-0000")
    news.save(122.0)
    assert len(rows.batches) == 2 + 120 // BEAT_SAVE_S


def test_a_large_fleet_is_stored_in_parts_and_nobody_is_forgotten():
    """Each part is short, and all of them together hold every device once, in the order in which they came."""
    news, rows, names = news_of(3 * ROWS_AT_ONCE + 1)
    turns = 1
    while news.save(1.0):
        turns += 1
    assert turns == 4
    assert max(map(len, rows.batches)) == ROWS_AT_ONCE
    assert [name for batch in rows.batches for name in batch] == names


def test_what_cannot_be_stored_stays_due():
    """A full disk loses no news."""
    news, rows, names = news_of(2)
    rows.full = True
    with pytest.raises(StoreError):
        news.save(1.0)
    rows.full = False
    news.save(2.0)
    assert rows.batches == [names]


def test_thousands_that_join_are_one_line(caplog):
    """The log names some of them and counts the others."""
    news, _, names = news_of(1000)
    with caplog.at_level(logging.INFO, "edge.coordinator"):
        for name in names:
            news.say(name, "joined")
        news.sum_up()
        news.say("d-0000", "left")
    assert len(caplog.messages) == LINES_AT_ONCE + 2
    assert caplog.messages[-2] == f"and {1000 - LINES_AT_ONCE} more devices joined; 1000 are online"
    assert caplog.messages[-1] == "device d-0000 left"
