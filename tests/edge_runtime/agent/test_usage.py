"""Joules of the day and bytes of the month, over clocks that jump."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.hours import LocalTime
from edge_runtime.agent.rates import Rate, StepRates, Throughput
from edge_runtime.agent.usage import Usage

DAY_S = 86_400.0


def day(number: int) -> LocalTime:
    """Noon of a day; months of 30 days."""
    return LocalTime(number, number // 30, 43_200.0, 43_200.0, 43_200.0, 1e6)


def test_a_new_day_begins_anew():
    """Joules are of the day, bytes of the month."""
    usage = Usage()
    usage.passed(day(59), 5.0)
    usage.drew(10.0)
    usage.moved(1000)
    usage.passed(day(59), 5.0)
    assert (usage.day.used, usage.month.used) == (10.0, 1000)
    usage.passed(day(60), 5.0)
    assert (usage.day.used, usage.month.used) == (0.0, 0.0)


def test_a_clock_that_goes_back_gives_no_second_day():
    """However often it goes back and forth, what was drawn stays drawn."""
    usage = Usage()
    usage.passed(day(31), 5.0)
    usage.drew(10.0)
    for number in (30, 31, 29, 31):
        usage.passed(day(number), 5.0)
        assert usage.day.used == 10.0
    usage.passed(None, 5.0)  # it lost its battery and begins in 1970
    usage.drew(1.0)
    assert usage.day.used == 11.0


def test_a_clock_that_was_far_ahead_is_believed_again_after_a_day():
    """A device that once had the year 2099 is not without joules until then: a day that it ran is a day."""
    usage = Usage()
    usage.passed(day(30_000), 5.0)
    usage.drew(10.0)
    usage.passed(day(100), DAY_S / 2)
    assert usage.day.used == 10.0
    usage.passed(day(100), DAY_S / 2)
    assert (usage.day.used, usage.day.number) == (0.0, 100)
    usage.drew(3.0)
    usage.passed(day(101), 5.0)
    assert usage.day.used == 0.0


@given(
    st.lists(st.tuples(st.none() | st.integers(100, 105), st.floats(0, 3600.0), st.floats(0, 50.0)), max_size=40),
)
def test_no_clock_gives_more_than_one_day_for_each_number(looks):
    """Days begin anew at most once for every later day that the clock names, and once for every day that it ran."""
    usage, begun = Usage(), 0
    for number, ran_s, joules in looks:
        before = usage.day.number
        usage.passed(None if number is None else day(number), ran_s)
        begun += usage.day.number != before
        usage.drew(joules)
    assert begun <= 6 + sum(ran_s for _, ran_s, _ in looks) / DAY_S


def test_rates_of_steps_are_kept_by_bundle():
    """The newest job counts half; what a job could not know stays as it was; old bundles go."""
    rates = StepRates()
    rates.trained("a", 10, 5.0, None)
    rates.trained("a", 10, 10.0, 20.0)
    assert rates.all()["a"] == Rate(0.75, 2.0)
    rates.trained("a", 10, 10.0, None)
    assert rates.all()["a"] == Rate(0.875, 2.0)
    rates.trained("b", 0, 10.0, 5.0)
    assert rates.last == "a"
    for number in range(20):
        rates.trained(f"c{number}", 1, 1.0, 1.0)
    assert ("a" in rates.all(), len(rates.all()), rates.last) == (False, 8, "c19")


def test_the_link_is_measured_by_what_it_carried():
    """Transfers at a time share the link; small ones say nothing, nor what a lost connection interrupted."""
    rate = Throughput()
    rate.begins(0.0, "a", 100_000)
    rate.begins(0.5, "b", 25_000)
    rate.ends(0.75, "b")
    assert rate.kbit_s is None
    rate.ends(1.0, "a")
    assert rate.kbit_s == pytest.approx(1000.0)
    rate.begins(2.0, "c", 250_000)
    rate.ends(3.0, "c")
    assert rate.kbit_s == pytest.approx(1500.0)
    rate.begins(4.0, "d", 1000)
    rate.ends(4.1, "d")
    rate.begins(5.0, "e", 10**9)
    rate.stops()
    rate.ends(6.0, "e")
    rate.ends(6.0, "never")
    assert rate.kbit_s == pytest.approx(1500.0)
