"""What a device expects of itself, from its own history."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.availability import Availability

H, WEEK = 3600.0, 7 * 86_400.0


def live(table: Availability, hours: int, could, start_s: float = 0.0, tick_s: float = 300.0) -> float:
    """Lets time pass; ``could`` by hour of the week."""
    at = start_s
    while at <= start_s + hours * H:
        table.seen(1.8e9 + at, at % WEEK, could(int(at % WEEK // H)))
        at += tick_s
    return at


def at_night(hour: int) -> bool:
    return hour % 24 < 6


@given(st.lists(st.tuples(st.sampled_from([600.0, 1800.0, 3599.0]), st.booleans()), max_size=400))
@settings(max_examples=20, deadline=None)
def test_what_is_kept_is_all_that_is_known(looks):
    """A daemon that starts from what was written down foresees the same as the one that wrote it, whatever it saw."""
    table, at = Availability(), 0.0
    for passed_s, could in looks:
        at += passed_s
        table.seen(1.8e9 + at, at % WEEK, could)
    again = Availability(table.pack())
    for hour in (0, 50, 167):
        foreseen = table.predict(hour * H)
        assert again.predict(hour * H) == (None if foreseen is None else pytest.approx(foreseen, abs=1e-3))


def test_hours_are_learnt():
    """After two weeks a device that may train at night knows which hours those are, also those that come in part."""
    table = Availability()
    assert table.predict(0.0) is None
    live(table, 2 * 168, at_night)
    assert table.predict(2 * H) > 0.7
    assert table.predict(12 * H) < 0.12
    assert 0.3 < table.predict(5.5 * H) < 0.6
    assert table.predict(24 * H - 1800.0, horizon_s=7200.0) > table.predict(12 * H)


def test_an_hour_that_was_never_seen_is_like_the_others():
    """After one day the other days are guessed from the share of all hours."""
    table = Availability()
    live(table, 24, at_night)
    assert abs(table.predict(3 * 86_400.0 + 2 * H) - 0.25) < 0.05
    assert table.predict(2 * H) > 0.5


def test_one_hour_a_day_is_foreseen():
    """A device that is on for one hour of every day expects itself in that hour after a week, and in no other."""
    table = Availability()
    for day in range(8):
        at = day * 86_400.0 + 18 * H
        if day:
            table.was_off(at % WEEK, 23 * H)
        if day < 7:
            live(table, 1, lambda _hour: True, at)
    assert table.predict(18 * H) > 0.4
    assert table.predict(12 * H) < 0.1


def test_the_latest_weeks_count_most():
    """A device whose owner changed the hours has relearnt them after some weeks."""
    table = Availability()
    end = live(table, 4 * 168, at_night)
    live(table, 5 * 168, lambda hour: not at_night(hour), end + WEEK - end % WEEK)
    assert table.predict(2 * H) < 0.4
    assert table.predict(12 * H) > 0.8


def test_jumps_of_the_clock_add_nothing():
    """Back, or by more than an hour: what lies between is not history. Nor is what a clock says that was never set."""
    table = Availability()
    live(table, 168, lambda _hour: True)
    before = table.predict(50 * H)
    for clock, week in ((1.9e9, 0.0), (1.7e9, 100.0), (1.7e9 + 2 * H, 50 * H), (5.0, None), (1.95e9, 50 * H)):
        table.seen(clock, week, False)
    assert table.predict(50 * H) == before


def test_the_table_survives_a_restart_in_little_space():
    """Packed, it says the same but for what was seen in the last minutes; damaged, it begins anew."""
    table = Availability()
    live(table, 168, at_night)
    data = table.pack()
    assert len(data) < 1000
    again = Availability(data)
    for hour in range(0, 168, 5):
        assert abs(again.predict(hour * H) - table.predict(hour * H)) < 0.02
    assert Availability(data[:-1]).predict(0.0) is None
    assert Availability(b"\x07" + data[1:]).predict(0.0) is None


def test_hours_that_a_device_is_off_count_against_it():
    """Whoever runs in the evenings only can take part in the evenings: not whenever it was seen."""
    table, evening = Availability(), 18 * H
    for day in range(14):
        live(table, 4, lambda _hour: True, day * 86_400.0 + evening)
        table.was_off((day + 1) * 86_400.0 % WEEK + evening, 20 * H)
        table = Availability(table.pack())
    assert table.predict(19 * H) > 0.6
    assert table.predict(9 * H) < 0.15


def test_of_a_long_absence_a_week_counts():
    """A year in a drawer is a week of no; a moment is next to nothing."""
    once, long, short = (Availability() for _ in range(3))
    for table, off_s in ((once, WEEK), (long, 52 * WEEK), (short, 5.0)):
        live(table, 168, lambda _hour: True)
        table.was_off(1234.5, off_s)
    assert once.pack() == long.pack()
    assert all(once.predict(hour * H) < 0.8 for hour in range(168))
    assert all(short.predict(hour * H) > 0.97 for hour in range(168))


@settings(max_examples=50, deadline=None)
@given(
    looks=st.lists(
        st.tuples(st.floats(-1e12, 1e12), st.none() | st.floats(0, WEEK, exclude_max=True), st.booleans()), max_size=60
    ),
    off=st.lists(st.tuples(st.floats(-1e7, WEEK), st.floats(0, 1e9)), max_size=2),
    at=st.floats(0, WEEK, exclude_max=True),
    horizon=st.floats(1.0, 7 * H),
)
def test_a_prediction_is_a_share(looks, off, at, horizon):
    """Whatever clocks do, the prediction is unknown, or from 0 to 1."""
    table = Availability()
    for look in looks:
        table.seen(*look)
    for back, off_s in off:
        table.was_off(back, off_s)
    predicted = Availability(table.pack()).predict(at, horizon), table.predict(at, horizon)
    assert all(value is None or -1e-9 <= value <= 1 + 1e-9 for value in predicted)
