"""Virtual devices do what their traces say: presence, battery, link, joules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.plan import Training
from coordinator.simulation import Settings, simulate
from coordinator.simulation.battery import Battery
from coordinator.simulation.traces import LinkTrace
from tests.coordinator.simulation import helpers as h

CHANGES = st.lists(
    st.tuples(st.floats(0.0, 1e4), st.floats(-50.0, 50.0), st.floats(0.0, 100.0)), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(CHANGES, st.floats(0.1, 100.0), st.floats(0.0, 100.0), st.floats(0.0, 50.0))
def test_a_battery_stays_within_its_bounds(changes, capacity_wh, percent, reserve):
    """Whatever is drawn or charged, the level is between empty and full, and is reached when it was foretold."""
    trace = h.device(battery_wh=capacity_wh, battery_percent=percent, reserve_percent=reserve)
    battery, now = Battery(trace), 0.0
    for seconds, watts, joules in changes:
        battery.set_watts(now, watts)
        foretold = battery.reaches_s(now, battery.reserve_j)
        level = battery.level_j(now)
        if math.isfinite(foretold) and (level - battery.reserve_j) * watts > 0:
            assert battery.level_j(foretold) == pytest.approx(battery.reserve_j, rel=1e-6, abs=1e-3)
        now += seconds
        battery.take(now, joules)
        assert 0.0 <= battery.level_j(now) <= battery.capacity_j
        assert 0.0 <= battery.percent(now) <= 100.0


def test_mains_never_run_out():
    """A device without a battery has no level, and none is ever reached."""
    battery = Battery(h.device())
    battery.set_watts(0.0, 1e6)
    assert battery.percent(1e9) is None
    assert battery.reaches_s(0.0, battery.reserve_j) == math.inf


def test_time_and_joules_come_from_the_trace(tmp_path):
    """Steps take the device's step time and watts; bytes take the link's rate and the radio's joules."""
    slow = LinkTrace(name="slow", times_s=[0.0], up_kbit_s=[8.0], down_kbit_s=[8.0], period_s=60.0, round_trip_s=1.0)
    world = h.traces(
        h.device(
            slowdown=2.0,
            training_watts=3.0,
            idle_watts=0.5,
            link="slow",
            radio_joules_per_mb_up=1000.0,
            radio_joules_per_mb_down=1000.0,
        )
    )
    world.links["slow"] = slow
    report = simulate(h.plan(tmp_path, target=1, rounds=1), world, Settings(step_s=5.0))
    (job,) = report.assignments
    assert (job.device, job.steps, job.outcome) == ("pi", 3, "counted")
    joules = report.modelled_joules
    assert joules.training == pytest.approx(3 * 5.0 * 2.0 * 3.0)
    bytes_ = report.versions[1].bytes_up + report.versions[1].bytes_down
    assert joules.radio == pytest.approx(bytes_ / 1e6 * 1000.0)
    # model and bundle down, update up, at 1000 bytes a second and a second of round trip each; messages half of that
    expected = 30.0 + bytes_ / 1000.0
    assert expected < report.versions[1].virtual_s < expected + 6.0
    assert report.wasted_fraction == pytest.approx(0.0)


@pytest.mark.parametrize(("leaving", "trained", "ends_s"), [("continues", 1, 500.0), ("ends", 1, 700.0)])
def test_a_device_that_leaves(tmp_path, leaving, trained, ends_s):
    """Its job ends with its agent and is done again, or goes on, and its update comes when the device is back."""
    world = h.traces(h.device(presence="gaps", training_watts=1.0), gaps=([(0.0, 100.0), (500.0, 100_000.0)], []))
    plan = h.plan(tmp_path, target=1, rounds=1, training=Training(steps=20, batch_size=8), deadline_s=3000.0)
    report = simulate(plan, world, Settings(step_s=10.0, leaving=leaving))
    assert report.status == "finished"
    assert report.trained == trained
    assert report.versions[1].virtual_s == pytest.approx(ends_s, abs=2.0)
    again = 100.0 if leaving == "ends" else 0.0
    assert report.modelled_joules.training == pytest.approx(200.0 + again, abs=1.0)


def drained(**changes):
    """One device whose battery a few jobs empty; it charges from 5000 s on."""
    return h.traces(
        h.device(
            presence="night",
            training_watts=36.0,
            battery_wh=1.0,
            battery_percent=47.0,
            reserve_percent=20.0,
            charge_watts=40.0,
            **changes,
        ),
        night=([(0.0, 100_000.0)], [(5000.0, 100_000.0)]),
    )


def test_a_device_is_lost_to_its_battery_and_comes_back(tmp_path):
    """It goes when it is down to its reserve, in the middle of a job, and comes back when it has been charged."""
    plan = h.plan(tmp_path, target=1, rounds=5, training=Training(steps=10, batch_size=8), attempts=50)
    report = simulate(plan, drained(), Settings(step_s=1.0))
    assert report.status == "finished"
    assert report.lost_to_battery >= 1
    assert report.device_reports[0].lost_to_battery == report.lost_to_battery
    assert report.virtual_s > 5000.0
    assert report.modelled_joules.wasted > 0.0


def test_a_device_that_keeps_its_reserve_declines(tmp_path):
    """With its owner's limit set it says no to what it cannot afford, and is never lost."""
    plan = h.plan(tmp_path, target=1, rounds=5, training=Training(steps=10, batch_size=8), attempts=50)
    report = simulate(plan, drained(), Settings(step_s=1.0, keep_reserve=True))
    assert report.status == "finished"
    assert report.lost_to_battery == 0
    assert report.outcomes["declined"] >= 1
    assert report.virtual_s > 5000.0
    assert report.modelled_joules.wasted == pytest.approx(0.0, abs=1.0)


def test_a_limit_of_joules_ends_jobs_early(tmp_path):
    """They send what they reached, with fewer steps' joules."""
    plan = h.plan(tmp_path, target=1, rounds=1, training=Training(steps=100, batch_size=8, job_joules=10.0))
    report = simulate(plan, h.traces(h.device(training_watts=2.0)), Settings(step_s=1.0))
    assert report.outcomes == {"counted": 1}
    assert report.modelled_joules.training == pytest.approx(10.0)
