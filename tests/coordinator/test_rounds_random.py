"""The round machine in a hostile world: whatever happens, nothing counts twice, nothing is lost, the run ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plan import Downlink, Training
from tests.coordinator import helpers as h
from tests.coordinator.conftest import MACHINE
from tests.coordinator.world import World

PLANS = st.builds(
    lambda mode, target, short, over, staleness, attempts, tested, rounds, chain: h.plan(
        mode=mode,
        training=Training(steps=10),
        target=target,
        minimum=max(1, target - short),
        over_commit=over,
        max_staleness=staleness,
        attempts=attempts,
        rounds=rounds,
        test_set="t.npz" if tested else None,
        evaluate_every=2,
        downlink=Downlink(codec="raw", chain=chain),
    ),
    st.sampled_from(["synchronous", "buffered", "anarchic"]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([1.0, 1.5, 2.0]),
    st.integers(0, 2),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 5),
    st.sampled_from([1, 2, 64]),
)
HAPPENINGS = st.integers(0, 100).flatmap(  # a length first: plain lists would mostly be very short
    lambda length: st.lists(st.integers(0, 20 * 4 * 400), min_size=length, max_size=length)
)


@MACHINE
@given(PLANS, HAPPENINGS, st.booleans())
def test_any_history_ends_well(plan, happenings, lossy):
    """Duplicates, reordering, losses, crashes and strangers in any order; then fair delivery ends the run.

    With a lossy downlink devices forget what they hold, miss versions and fail; each job still leads from what its
    device has to the version it names, or the device says no and gets another way.
    """
    world = World(plan, "abcd", lossy=lossy)
    for number in happenings:
        world.act(number)
    world.run_fairly()
    world.check_end()


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 4), st.booleans())
def test_crashes_do_not_change_the_outcome(crashes, rounds, lossy):
    """With every device in every round, crashes between any two effects lead to the same models."""
    plan = h.plan(target=4, minimum=4, rounds=rounds, attempts=50, test_set="t.npz")
    calm = World(plan, "abcd", lossy=lossy)
    calm.run_fairly()
    world = World(plan, "abcd", lossy=lossy)
    plain_event = world.event
    pending = list(crashes)

    def event_with_crash(event):
        if pending and world.crash_after is None:
            world.crash_after = pending.pop()
        plain_event(event)

    world.event = event_with_crash
    world.run_fairly()
    world.check_end()
    assert world.state.run.model == calm.state.run.model
    assert world.state.run.vector_sha256 == calm.state.run.vector_sha256
    assert world.state.run.status == calm.state.run.status == "finished"


@given(HAPPENINGS)
def test_the_machine_is_deterministic(happenings):
    """The same events lead to the same state, rows and aggregates."""
    plan = h.plan(rounds=4, over_commit=1.5, seed=7)
    worlds = [World(plan, "abcd", lossy=True), World(plan, "abcd", lossy=True)]
    for world in worlds:
        for number in happenings:
            world.act(number)
    assert worlds[0].rows == worlds[1].rows
    assert worlds[0].aggregates == worlds[1].aggregates


def test_a_quiet_fleet_gets_one_change_a_round():
    """Devices that are there in every round start from what they have; nobody fetches a whole model."""
    world = World(h.plan(target=4, minimum=4, rounds=5), "abcd", lossy=True)
    world.run_fairly()
    world.check_end()
    assert sorted(world.ways) == sorted([(max(0, version - 1), version) for version in range(5)] * 4)
