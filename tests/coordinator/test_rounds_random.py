"""The round machine in a hostile world: whatever happens, nothing counts twice, nothing is lost, the run ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.coordinator import helpers as h
from tests.coordinator.conftest import MACHINE
from tests.coordinator.world import World

PLANS = st.builds(
    lambda target, short, over, staleness, attempts, tested, rounds: h.plan(
        target=target,
        minimum=max(1, target - short),
        over_commit=over,
        max_staleness=staleness,
        attempts=attempts,
        rounds=rounds,
        test_set="t.npz" if tested else None,
        evaluate_every=2,
    ),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([1.0, 1.5, 2.0]),
    st.integers(0, 2),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 5),
)
HAPPENINGS = st.integers(0, 100).flatmap(  # a length first: plain lists would mostly be very short
    lambda length: st.lists(st.integers(0, 20 * 4 * 400), min_size=length, max_size=length)
)


@MACHINE
@given(PLANS, HAPPENINGS)
def test_any_history_ends_well(plan, happenings):
    """Duplicates, reordering, losses, crashes and strangers in any order; then fair delivery ends the run."""
    world = World(plan, "abcd")
    for number in happenings:
        world.act(number)
    world.run_fairly()
    world.check_end()


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 4))
def test_crashes_do_not_change_the_outcome(crashes, rounds):
    """With every device in every round, crashes between any two effects lead to the same models."""
    plan = h.plan(target=4, minimum=4, rounds=rounds, attempts=50, test_set="t.npz")
    calm = World(plan, "abcd")
    calm.run_fairly()
    world = World(plan, "abcd")
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
    assert world.state.run.status == calm.state.run.status == "finished"


@given(HAPPENINGS)
def test_the_machine_is_deterministic(happenings):
    """The same events lead to the same state, rows and aggregates."""
    plan = h.plan(rounds=4, over_commit=1.5, seed=7)
    worlds = [World(plan, "abcd"), World(plan, "abcd")]
    for world in worlds:
        for number in happenings:
            world.act(number)
    assert worlds[0].rows == worlds[1].rows
    assert worlds[0].aggregates == worlds[1].aggregates
