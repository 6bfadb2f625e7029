"""Local time and spans of hours."""

from __future__ import annotations

import time

import pytest

from edge_runtime.agent.hours import hours_left_s, hours_wait_s, local_time, parse_hours

H = 3600.0


@pytest.fixture
def berlin(monkeypatch):
    """A time zone with summer time."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("at", "left", "wait"),
    [(23, 7, 13), (2, 4, 10), (6, 0, 6), (12, 0.5, 0), (12.5, 0, 9.5), (22, 8, 0), (5.999, 0.001, 6.001)],
)
def test_spans_may_last_over_midnight(at, left, wait):
    """How long training may go on, and when it may begin again."""
    spans = parse_hours("22:00-06:00, 12:00-12:30")
    assert hours_left_s(spans, at * H) == pytest.approx(left * H)
    assert hours_wait_s(spans, at * H) == pytest.approx(wait * H)


def test_spans_that_follow_each_other_are_one():
    """Also over midnight; all of the day never ends."""
    assert hours_left_s(parse_hours("20:00-24:00, 00:00-06:00"), 21 * H) == 9 * H
    assert hours_left_s(parse_hours("00:00-24:00"), 5 * H) == 24 * H
    assert hours_left_s(parse_hours("06:00-18:00,18:00-06:00"), 5 * H) == 24 * H


@pytest.mark.usefixtures("berlin")
def test_days_and_months_are_local():
    """A day begins at local midnight, a week on Monday, a month on its first; numbers only grow."""
    late = local_time(1_798_757_999.5)  # 2026-12-31 23:59:59.5 CET, a Thursday
    new = local_time(1_798_758_000.0)
    assert (late.day_second, late.day_left_s, late.month_left_s) == (86_399.5, 1.0, 1.0)
    assert (new.day_second, new.week_second, new.day_left_s) == (0.0, 4 * 86_400.0, 86_400.0)
    assert new.month_left_s == 31 * 86_400.0
    assert (new.day > late.day, new.month) == (True, late.month + 1)


@pytest.mark.parametrize("clock_unix_s", [-1e9, 0.0, 1e9, 1e12, 1e300, float("inf")])
def test_a_clock_that_was_never_set_has_no_local_time(clock_unix_s):
    """Nor has one that cannot be right."""
    assert local_time(clock_unix_s) is None
