"""The published selectors do what their papers say."""

from __future__ import annotations

import math

import pytest

from coordinator.errors import PluginError
from coordinator.scheduling import SELECTORS
from edge_runtime.messages import DatasetInfo
from tests.coordinator.scheduling import world as w


def make(name, **options):
    return SELECTORS.create(name, options)


def many(selector, heartbeats, rows, *, count=2, seeds=100, **changes):
    fleet = w.fleet(heartbeats)
    return w.frequencies(selector, fleet, len(rows), seeds=seeds, count=count, history=w.histories(rows), **changes)


@pytest.mark.parametrize("name", SELECTORS.names())
def test_options_are_checked(name):
    """A wrong name or value is an error that says so."""
    with pytest.raises(PluginError, match="unknown colour"):
        make(name, colour=1.0)


def test_option_ranges_are_named():
    """The message names the option, what it was, and what it may be."""
    with pytest.raises(PluginError, match="weight is 2, it must be 0 to 1"):
        make("eafl", weight=2.0)
    with pytest.raises(PluginError, match=r"cool_down_rounds is 1.5; give a whole number"):
        make("refl", cool_down_rounds=1.5)


def test_power_of_choice_takes_the_highest_losses_of_those_drawn():
    """With d the whole fleet the highest losses win; a device never counted comes before them."""
    rows = [w.past(number, loss_rms=float(number)) for number in range(6)]
    often = many(make("power_of_choice", d=6.0), [w.beat()] * 6, rows)
    assert often == [0, 0, 0, 0, 1, 1]
    rows[0] = None
    assert many(make("power_of_choice", d=6.0), [w.beat()] * 6, rows) == [1, 0, 0, 0, 0, 1]


def test_power_of_choice_draws_by_samples():
    """Devices with more data are among the drawn more often."""
    fleet = w.fleet([w.beat()] * 20)
    for number in range(10):
        big = w.h.device(w.name(number), session="s2", datasets=[DatasetInfo(name="digits", samples=1000)])
        fleet.announce(1.0, big)
    often = w.frequencies(make("power_of_choice", d=2.0), fleet, 20, seeds=100, count=2)
    assert sum(often[:10]) > 3 * sum(often[10:])


def test_oort_prefers_useful_devices_among_those_tried():
    """High loss on as much data is drawn, and only among those near the cut-off."""
    rows = [w.past(number, loss_rms=1.0 if number < 6 else 3.0) for number in range(10)]
    often = many(make("oort", exploration=0.0, exploration_least=0.0), [w.beat()] * 10, rows)
    assert sum(often[:6]) == 0
    assert all(share > 0.3 for share in often[6:])


def test_oort_brings_back_who_was_away():
    """The staleness bonus outweighs a small difference in utility."""
    rows = [w.past(number, loss_rms=2.0 if number else 0.5, last_round=99) for number in range(5)]
    rows.append(w.past(5, loss_rms=1.9, last_round=0))
    often = many(make("oort", exploration=0.0, exploration_least=0.0), [w.beat()] * 6, rows, round_=100, count=1)
    assert often[5] == 1.0
    recent = [*rows[:5], w.past(5, loss_rms=1.9, last_round=99)]
    kept = many(make("oort", exploration=0.0, exploration_least=0.0), [w.beat()] * 6, recent, round_=100, count=1)
    assert kept[5] < 0.4


def test_oort_penalises_slow_devices_until_the_pacer_lets_them_in():
    """Slower than the percentile costs score; at 100 % it costs none."""
    rows = [w.past(number, elapsed_s=100.0 if number < 2 else 10.0) for number in range(8)]
    rows[0].loss_rms = rows[1].loss_rms = 1.2
    selector = make("oort", exploration=0.0, exploration_least=0.0)
    assert sum(many(selector, [w.beat()] * 8, rows)[:2]) == 0.0
    assert sum(many(selector, [w.beat()] * 8, rows, memory={"percentile": 100.0})[:2]) == 2.0


def test_oort_explores_less_and_less():
    """A share of the places goes to devices never tried, decaying by rounds down to its least."""
    rows = [w.past(number) if number < 20 else None for number in range(40)]
    selector, fleet = make("oort"), w.fleet([w.beat()] * 40)
    shares = []
    for round_ in (0, 20, 500):
        often = w.frequencies(selector, fleet, 40, seeds=60, count=10, history=w.histories(rows), round_=round_)
        shares.append(sum(often[20:]) / 10)
    assert shares == pytest.approx([0.9, 0.9 * 0.98**20, 0.3], abs=0.04)


def test_oort_explores_fast_devices_first():
    """Of those never tried, the fast ones with enough data are drawn more often."""
    beats = [w.beat(step_us=100_000 if number < 5 else 10_000_000) for number in range(10)]
    often = many(make("oort", exploration_window=1.0), beats, [None] * 10)
    assert sum(often[5:]) == 0.0


def test_oort_blacklist_holds_at_most_its_share():
    """Those asked too often are left out, but never so many that the pool is empty."""
    selector = make("oort", blacklist_jobs=3.0)
    history = w.histories([w.past(number, asked=10 + number) for number in range(10)])
    left = w.chosen(selector, w.fleet([w.beat()] * 10), w.request(10, 10, history=history))
    assert sorted(left) == list(range(7))
    alone = w.histories([w.past(0, asked=10)])
    assert w.chosen(selector, w.fleet([w.beat()]), w.request(1, 1, history=alone)) == [0]


def test_oort_paces():
    """Flat utility lets slower devices in, a five-fold change brings the limit back; one lie moves nothing."""
    selector, memory = make("oort", pacer_rounds=2.0), {}

    def close(*losses):
        outcomes = [w.outcome(number, loss_rms=loss) for number, loss in enumerate(losses)]
        selector.round_closed(0, outcomes, {}, memory)

    for _ in range(4):
        close(1.0, 1.0, 1.0)
    assert memory["percentile"] == 35.0
    for lie in (1e30, math.nan):
        close(1.0, 1.0, lie)
        close(1.0, 1.0, 1.0)
    assert memory["percentile"] >= 35.0
    before = memory["percentile"]
    for _ in range(2):
        close(20.0, 20.0, 20.0)
    assert memory["percentile"] == before - 5.0


def test_eafl_weighs_utility_against_charge():
    """With equal weights of both kinds the fuller battery wins over the useful one, or not, by the option."""
    beats = [w.on_battery(95 if number < 3 else 40) for number in range(6)]
    rows = [w.past(number, loss_rms=1.0 if number < 3 else 3.0) for number in range(6)]
    still = {"exploration": 0.0, "exploration_least": 0.0}
    assert sum(many(make("eafl", weight=0.1, **still), beats, rows)[:3]) == 2.0
    assert sum(many(make("eafl", weight=0.9, **still), beats, rows)[:3]) == 0.0


def test_refl_takes_the_least_available_that_have_rested():
    """Ascending availability; who was asked in the last rounds only where nobody else is left."""
    beats = [w.beat(availability_percent=10 * number) for number in range(6)]
    rows = [w.past(number, last_round=9 if number == 0 else 1) for number in range(6)]
    assert many(make("refl"), beats, rows, round_=10) == [0, 1, 1, 0, 0, 0]
    whole = w.request(6, 6, attempt=1, history=w.histories(rows))
    assert sorted(w.chosen(make("refl"), w.fleet(beats), whole)) == [*range(6)]


def test_refl_asks_fewer_while_late_updates_are_expected():
    """Once a round, at its first selection; later ones fill places as they are asked to."""
    selector, fleet = make("refl"), w.fleet([w.beat()] * 10)
    memory: dict[str, float] = {}
    plan = w.plan(target=4, over_commit=1.5)

    def select(late, **changes):
        request = w.request(
            6, 10, **{"plan": plan, "memory": memory, "expected_late": [(90.0, 100.0)] * late, **changes}
        )
        selection = selector.select(50.0 * request.round, fleet, request)
        return len(selection.choices), selection.wanted

    assert select(2) == (3, 2)
    assert select(2) == (6, None)
    assert select(9, round_=11) == (2, 1)
    assert select(3, round_=12, plan=w.plan(mode="buffered")) == (6, None)
    assert select(0, round_=12, plan=w.plan(target=20, over_commit=1.5)) == (6, 6)


def test_refl_counts_only_late_updates_that_are_due():
    """Those that end within the moving average of the rounds' seconds; not slower ones, nor those long overdue."""
    selector, fleet, memory = make("refl"), w.fleet([None] * 40), {}
    plan = w.plan(target=20, deadline_s=100.0)

    def wanted(now, round_, *late):
        request = w.request(20, 40, plan=plan, round_=round_, memory=memory, expected_late=late)
        return selector.select(now, fleet, request).wanted

    assert wanted(0.0, 0, (10.0, 90.0), (10.0, 200.0), (30.0, None)) == 18  # a round may take its whole deadline
    due, not_yet, overdue, silent = (50.0, 75.0), (50.0, 90.0), (90.0, 50.0), (90.0, None)
    assert wanted(30.0, 1, due, not_yet, overdue, silent) == 18  # the round before took 30 s
    assert memory["round_s"] == 30.0
    assert wanted(40.0, 2, (50.0, 64.0), due) == 19
    assert memory["round_s"] == 0.75 * 10.0 + 0.25 * 30.0
    assert wanted(1e6, 3) == 20
    assert memory["round_s"] == pytest.approx(0.75 * 500.0 + 0.25 * 15.0)  # the coordinator was off: all its attempts
    assert wanted(0.0, 4) == 20
    assert memory["round_s"] == pytest.approx(0.25 * 378.75)  # its clock was set back


@pytest.mark.parametrize("name", ["random", "energy_aware"])
def test_anchors_are_drawn_among_those_able(name):
    """Each chosen device that announced the role is an anchor with the option's probability."""
    selector = make(name, anchor_probability=0.5)
    able, unable = w.fleet([w.beat()] * 10, abilities=["anchor"]), w.fleet([w.beat()] * 10)
    roles = [
        choice.role for seed in range(40) for choice in selector.select(0.0, able, w.request(5, 10, seed=seed)).choices
    ]
    assert 0.35 < roles.count("anchor") / len(roles) < 0.65
    assert all(choice.role == "trainer" for choice in selector.select(0.0, unable, w.request(5, 10)).choices)
