"""What every registered selector keeps, whatever devices say: installed ones included."""

from __future__ import annotations

import math
import sys
import tracemalloc
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.events import HistoryRow
from coordinator.scheduling import SELECTORS
from edge_runtime.messages import Heartbeat
from tests.coordinator.scheduling import world as w

NAMES = SELECTORS.names()
ENERGY = ("eafl", "energy_aware")  # those that look at batteries
CUT_OFF = ("eafl", "oort")  # those that leave out who has far less than the score that would just be in
LONG = st.none() | st.integers(0, 2**32 - 1)
PERCENT = st.none() | st.integers(0, 100)
ANY = st.floats() | st.sampled_from([1e30, -1e30, 0.0, 1e-30])

heartbeats = st.none() | st.builds(
    Heartbeat,
    on_external_power=st.none() | st.booleans(),
    link_metered=st.none() | st.booleans(),
    declines=st.sampled_from([0, 0, 0, 1, 4, 255]),
    free_memory_mb=st.none() | st.integers(0, 65535),
    temperature_margin_c=st.none() | st.integers(-128, 255),
    battery_percent=PERCENT,
    reserve_percent=PERCENT,
    up_kbit_s=LONG,
    down_kbit_s=LONG,
    bundle=st.sampled_from([b"", w.BUNDLE, b"no"]),
    step_us=LONG,
    step_uj=LONG,
    availability_percent=PERCENT,
    data_left_mb=st.none() | st.integers(0, 65535),
    joules_left=LONG,
)
pasts = st.none() | st.builds(
    HistoryRow,
    run=st.just("run"),
    device=st.just(""),
    asked=st.integers(0, 2**53),
    counted=st.integers(0, 2**53),
    failures=st.integers(0, 2**53),
    last_round=st.integers(-1, 20),
    loss_rms=st.none() | ANY,
    samples=st.none() | st.integers(0, 2**53),
    elapsed_s=st.none() | ANY,
    step_s=st.none() | ANY,
    step_j=st.none() | ANY,
    queue_j=ANY,
)
devices = st.lists(st.tuples(heartbeats, pasts), max_size=12)


def histories(rows):
    for number, row in enumerate(rows):
        if row is not None:
            row.device = w.name(number)
    return w.histories(rows)


def draw(selector, listed, count, seed, memory=None, **changes):
    fleet = w.fleet([heartbeat for heartbeat, _ in listed])
    history = histories([msgspec.structs.replace(row) if row else None for _, row in listed])
    request = w.request(count, len(listed), seed=seed, history=history, memory=memory, **changes)
    return request, selector.select(0.0, fleet, request)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(listed=devices, count=st.integers(0, 14), seed=st.integers(0, 9), round_=st.integers(0, 30))
def test_choices_are_sound_whatever_devices_say(name, listed, count, seed, round_):
    """Never too many, never twice, only candidates, never one that declines; work within the plan; a note for each."""
    request, selection = draw(SELECTORS.create(name, {}), listed, count, seed, round_=round_)
    names = [choice.device for choice in selection.choices]
    assert len(set(names)) == len(names) <= count
    assert set(names) <= set(request.candidates)
    for choice in selection.choices:
        heartbeat = listed[int(choice.device[1:])][0]
        assert heartbeat is None or heartbeat.declines == 0
        assert 2 <= choice.steps <= 10
        assert choice.epochs is None
        assert 0 < choice.deadline_s <= request.plan.participation.deadline_s
    assert set(selection.notes) == set(request.candidates)
    for note in selection.notes.values():
        assert note.reason
        assert all(math.isfinite(value) for value in note.figures.values())


@pytest.mark.parametrize("name", ENERGY)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    charges=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(1, 10**9)), min_size=1),
    seed=st.integers(0, 9),
)
def test_nobody_is_taken_below_its_reserve(name, charges, seed):
    """What the job draws leaves the owner's reserve, by the device's own joules per step."""
    listed = [(w.on_battery(soc, reserve_percent=kept, step_uj=uj), None) for soc, kept, uj in charges]
    _, selection = draw(SELECTORS.create(name, {}), listed, len(listed), seed)
    for choice in selection.choices:
        soc, kept, microjoules = charges[int(choice.device[1:])]
        after = soc / 100 - choice.steps * microjoules / 1e6 / (10.0 * 3600)
        assert after >= kept / 100 - 1e-9


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(listed=devices, seed=st.integers(0, 9))
def test_choices_are_the_same_after_a_restart(name, listed, seed):
    """Seed, heartbeats, and what is stored of histories and memory decide; nothing that lives in the selector."""
    memory: dict[str, float] = {}
    selector = SELECTORS.create(name, {})
    request, first = draw(selector, listed, 3, seed, memory)
    for number, choice in enumerate(first.choices):
        selector.observe(choice.device, w.outcome(number, failed=number == 0), memory)
    done = [w.outcome(int(choice.device[1:]), joules=5.0) for choice in first.choices]
    selector.round_closed(request.round, done, request.history, memory)
    stored = msgspec.msgpack.encode((memory, list(request.history.values())))
    fleet = w.fleet([heartbeat for heartbeat, _ in listed])
    made = []
    for again in (selector, SELECTORS.create(name, {})):
        kept, rows = msgspec.msgpack.decode(stored, type=tuple[dict[str, float], list[HistoryRow]])
        following = w.request(3, len(listed), seed=99, round_=11, history=w.histories(rows), memory=kept)
        made.append(again.select(0.0, fleet, following).choices)
    assert made[0] == made[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tried", [False, True])
def test_identical_devices_are_drawn_uniformly(name, tried):
    """Chi squared over many seeds: the order of names, or chance by sorting, favours nobody."""
    total, seeds, count = 12, 400, 3
    history = w.histories([w.past(number) if tried else None for number in range(total)])
    fleet = w.fleet([w.on_battery(80)] * total)
    often = w.frequencies(
        SELECTORS.create(name, {}), fleet, total, seeds=seeds, count=count, attempt=1, history=history
    )
    expected = count / total * seeds
    assert sum(often) == pytest.approx(count, abs=0.01)
    assert sum((one * seeds - expected) ** 2 / expected for one in often) < 35.0  # 11 degrees of freedom: p = 0.0002


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tried", [False, True])
def test_more_battery_never_lowers_the_chance(name, tried):
    """Of two fleets that differ in one device's charge alone, it is drawn as often or more often with more."""
    total, often = 8, []
    history = w.histories([w.past(number, last_round=number % 3) if tried else None for number in range(total)])
    for charge in (10, 27, 40, 60, 100):
        others = [w.on_battery(35 + 5 * number, step_uj=200_000_000) for number in range(1, total)]
        fleet = w.fleet([w.on_battery(charge, step_uj=200_000_000), *others])
        drawn = w.frequencies(SELECTORS.create(name, {}), fleet, total, seeds=100, count=3, history=history)
        often.append(drawn[0])
    assert all(after >= before - 0.05 for before, after in pairwise(often)), often
    if name in ENERGY:
        assert often[0] == 0.0 < often[-1]


@pytest.mark.parametrize("name", ENERGY)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(low=st.integers(0, 100), high=st.integers(0, 100), others=st.lists(st.integers(30, 100), min_size=2, max_size=6))
def test_scores_are_monotone_in_battery(name, low, high, others):
    """All else equal, more charge gives at least the score."""
    scores = []
    for charge in sorted((low, high)):
        beats = [w.on_battery(soc, step_uj=100_000_000) for soc in (charge, *others)]
        history = w.histories([w.past(number, counted=1 + number) for number in range(len(beats))])
        selection = SELECTORS.create(name, {}).select(0.0, w.fleet(beats), w.request(2, len(beats), history=history))
        scores.append(selection.notes[w.name(0)].figures.get("score", 0.0))
    assert scores[0] <= scores[1] * (1 + 1e-3)


LIES = {
    "huge loss": {"loss_rms": 1e30},
    "largest loss": {"loss_rms": 1e6},
    "no number": {"loss_rms": float("nan")},
    "infinite": {"loss_rms": float("inf"), "step_s": float("inf")},
    "negative": {"loss_rms": -5.0, "step_j": -1e30, "queue_j": -1e30},
    "samples": {"samples": 2**53},
    "impossible speed": {"step_s": 1e-30, "elapsed_s": 1e-30},
    "no energy": {"step_j": 0.0},
    "everything": {"loss_rms": 1e30, "samples": 2**53, "step_s": 0.0, "step_j": 1e-30, "queue_j": float("nan")},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lie", LIES)
def test_no_lie_makes_a_device_dominate(name, lie):
    """Whatever one of 40 claims, it is drawn at most four times as often as others, who have their turn."""
    total, count = 40, 2
    beats = [w.beat(bundle=b"", step_us=1, step_uj=0), *[w.beat(bundle=b"")] * (total - 1)]
    rows = [w.past(number, step_s=0.1, step_j=1.0) for number in range(total)]
    rows[0] = w.past(0, **{"step_s": 0.1, "step_j": 1.0, **LIES[lie]})
    often = w.frequencies(
        SELECTORS.create(name, {}), w.fleet(beats), total, seeds=150, count=count, history=w.histories(rows)
    )
    assert often[0] <= 4 * count / total + 0.06
    assert sum(often[1:]) >= count - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_lie_in_the_heartbeat_gains_little(name):
    """Free joules, an instant step and an endless battery, all in the bundle's name: the same bound."""
    total, count = 40, 2
    liar = w.beat(step_us=1, step_uj=1, battery_percent=100, up_kbit_s=2**32 - 1, down_kbit_s=2**32 - 1)
    history = w.histories([w.past(number) for number in range(total)])
    fleet = w.fleet([liar, *[w.beat()] * (total - 1)])
    often = w.frequencies(SELECTORS.create(name, {}), fleet, total, seeds=150, count=count, history=history)
    assert often[0] <= 4 * count / total + 0.06


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("charge", [80, 28])
def test_no_set_of_lies_gains_more_than_four_times(name, charge):
    """Loss, data, speed, joules, link and a plug at once, among honest devices on battery, near their reserve, too."""
    total, count, seeds = 40, 4, 250
    rows = [w.past(number, step_s=0.1, step_j=1.0, counted=5) for number in range(total)]
    rows[0] = w.past(0, step_s=1e-5, step_j=1e-6, counted=5, loss_rms=1e6, samples=10**9, elapsed_s=1e-3)
    endless = {"up_kbit_s": 2**32 - 1, "down_kbit_s": 2**32 - 1}
    liar = w.beat(battery_percent=100, step_us=1, step_uj=1, **endless)
    fleet = w.fleet([liar, *[w.on_battery(charge)] * (total - 1)])
    often = w.frequencies(
        SELECTORS.create(name, {}), fleet, total, seeds=seeds, count=count, attempt=1, history=w.histories(rows)
    )
    assert often[0] <= 4.0 * sum(often[1:]) / (total - 1) + 0.06  # 2 standard deviations of the draws


@pytest.mark.parametrize("name", NAMES)
def test_failing_devices_fade_but_not_for_ever(name):
    """The chance falls with every failure, and rounds later it is as before."""
    total, selector = 8, SELECTORS.create(name, {})
    fleet = w.fleet([w.on_battery(80)] * total)

    def share(failures, round_):
        rows = [w.past(number, last_round=round_ - 1 if number else 9) for number in range(total)]
        rows[0].failures = failures
        history = w.histories(rows)
        return w.frequencies(selector, fleet, total, seeds=250, count=2, history=history, round_=round_)[0]

    shares = [share(failures, 10) for failures in (0, 2, 20)]
    assert shares[0] == pytest.approx(0.25, abs=0.06)
    assert shares[1] < 0.7 * shares[0]
    assert shares[2] < 0.35 * shares[0]
    if name not in CUT_OFF:
        assert shares[1] > shares[2] > 0.0
    assert share(20, 200) > 0.8 * shares[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_heartbeat_is_not_believed(name):
    """Who came back with last week's heartbeat waits for its next; who never sends any, and who just did, does not."""
    selector, now = SELECTORS.create(name, {}), 7 * 86_400.0
    fleet = w.fleet([w.on_battery(90)] * 3 + [None])
    request = w.request(4, 4, attempt=1)
    selection = selector.select(now, fleet, request)
    assert [choice.device for choice in selection.choices] == [w.name(3)]
    assert selection.notes[w.name(0)].reason.startswith("waits for its heartbeat")
    fleet.measured(now - 600.0, w.name(0), w.on_battery(90))
    fleet.measured(now + 700.0, w.name(1), w.on_battery(90))  # the coordinator's clock was set back since
    selection = selector.select(now, fleet, w.request(4, 4, attempt=1))
    assert sorted(choice.device for choice in selection.choices) == [w.name(0), w.name(3)]


@pytest.mark.parametrize("name", NAMES)
def test_small_fleets(name):
    """Nobody wanted, nobody there, one candidate, unknown candidates: no error, and the one is taken."""
    selector = SELECTORS.create(name, {})
    assert w.chosen(selector, w.fleet([w.beat()]), w.request(0, 1)) == []
    assert w.chosen(selector, w.fleet([]), w.request(3, 0)) == []
    assert w.chosen(selector, w.fleet([w.beat()]), w.request(3, 1)) == [0]
    assert w.chosen(selector, w.fleet([None]), w.request(1, 1)) == [0]
    assert w.chosen(selector, w.fleet([]), w.request(1, 1)) == [0]


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_linear_in_the_fleet(name):
    """Calls made for four times the devices are at most four times as many, and some."""
    selector, calls = SELECTORS.create(name, {}), []
    for total in (500, 2000):
        fleet = w.fleet([w.on_battery(30 + number % 70) for number in range(total)])
        history = w.histories([w.past(number, loss_rms=float(number % 7)) for number in range(total)])
        request, made = w.request(20, total, history=history), [0]

        def count(_frame, event, _argument, made=made):
            made[0] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            selector.select(0.0, fleet, request)
        finally:
            sys.setprofile(None)
        calls.append(made[0])
    assert calls[1] <= 4.4 * calls[0]


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_linear_in_the_fleet(name):
    """At most so many times the bytes for four times the devices; one table of pairs would take sixteen times."""
    selector, peaks = SELECTORS.create(name, {}), []
    for total in (2000, 8000):
        fleet = w.fleet([w.on_battery(30 + number % 70) for number in range(total)])
        history = w.histories([w.past(number, loss_rms=float(number % 7)) for number in range(total)])
        request = w.request(20, total, history=history)
        selector.select(0.0, fleet, w.request(1, total, history=history))  # what is made once is made
        tracemalloc.start()
        try:
            selector.select(0.0, fleet, request)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 6.0 * peaks[0]
