"""The product's own selector: gates, work, scores, the energy queue, and how many it chooses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.plan import Training, Uplink
from coordinator.scheduling import SELECTORS
from coordinator.scheduling.energy_queue import SPENT, close_round, next_queue
from coordinator.submission import check_budgets
from edge_runtime.compression import Layout
from edge_runtime.errors import ConfigError
from tests.coordinator.scheduling import world as w


def make(**options):
    return SELECTORS.create("energy_aware", options)


def select(heartbeats, *, options=None, count=None, abilities=(), **changes):
    """The one choice per device, or the reason why there is none."""
    fleet = w.fleet(heartbeats, abilities=list(abilities))
    total = len(heartbeats)
    selection = make(**(options or {})).select(0.0, fleet, w.request(count or total, total, attempt=1, **changes))
    made = {choice.device: choice for choice in selection.choices}
    return [made.get(w.name(number), selection.notes[w.name(number)].reason) for number in range(total)]


def test_weak_devices_get_less_work_instead_of_none():
    """Half, a quarter... of the steps, by the deadline and by the joules above the reserve; never under the least."""
    beats = [
        w.beat(),
        w.beat(step_us=15_000_000),
        w.beat(step_us=45_000_000),
        w.beat(step_us=60_000_000),
        w.on_battery(26, reserve_percent=20, step_uj=150_000_000),
        w.beat(joules_left=6),
    ]
    whole, half, least, never, low, poor = select(beats, options={"margin_percent": 0.0})
    assert (whole.steps, whole.epochs, half.steps, least.steps) == (10, None, 5, 2)
    assert never == "would need 120 s of 100 s even for the least work"
    assert (low.steps, poor.steps) == (10, 5)
    low = select([w.on_battery(25, reserve_percent=20, step_uj=250_000_000)], options={"margin_percent": 0.0})[0]
    assert low.steps == 5


def test_a_plan_in_epochs_is_cut_to_steps():
    """The whole job stays in epochs; less of it is said in steps."""
    plan = w.plan(training={"epochs": 2, "steps": None, "batch_size": 10, "min_steps": 1})
    whole, part = select([w.beat(), w.beat(step_us=8_000_000)], plan=plan)
    assert (whole.epochs, whole.steps) == (2, None)
    assert (part.epochs, part.steps) == (None, 10)


@pytest.mark.parametrize(
    ("heartbeat", "reason"),
    [
        (w.on_battery(21, reserve_percent=20), "battery 21% after the job would be under 25%"),
        (w.on_battery(20), "battery 20% after the job would be under 25%"),
        (w.beat(declines=4), "its owner's limits forbid it now: battery"),
        (w.beat(declines=200), "its owner's limits forbid it now: a limit this version does not know"),
        (w.beat(free_memory_mb=10), "too little free memory"),
        (w.beat(temperature_margin_c=0), "too hot to begin"),
        (w.beat(availability_percent=0), "is likely to leave (availability 0%)"),
        (w.beat(data_left_mb=0), "its data cap is used up"),
        (w.beat(joules_left=1), "would draw 2 J, and 1 J are left for today"),
    ],
)
def test_gates_say_why(heartbeat, reason):
    """A device that should not be asked is not, and the note says it in words."""
    assert select([heartbeat]) == [reason]


def test_a_device_that_is_mostly_off_is_asked_while_it_is_on():
    """A job that ends within its probable presence is given to it; a longer one now and then, and never never."""
    mostly_off, there = w.beat(availability_percent=4), w.beat(availability_percent=95)
    assert w.frequencies(make(), w.fleet([mostly_off]), 1, seeds=20, count=1) == [1.0]  # 144 s for a job of 1 s
    slow = {"step_us": 30_000_000, "availability_percent": 4}
    plan = w.plan(deadline_s=1000.0, training={"steps": 10, "min_steps": 10})
    often = w.frequencies(make(), w.fleet([w.beat(**slow)]), 1, seeds=300, count=1, plan=plan)[0]
    assert 0.25 < often < 0.55  # 300 s; by chance 4 % / 10 %
    assert w.frequencies(make(), w.fleet([there]), 1, seeds=20, count=1, plan=plan) == [1.0]


def test_what_is_unknown_closes_no_gate():
    """A device that cannot measure anything is asked, and decides itself."""
    (choice,) = select([w.beat(bundle=b"", step_us=None, step_uj=None, up_kbit_s=None, on_external_power=None)])
    assert choice.steps == 10


def test_who_cannot_train_may_be_an_anchor():
    """One pass at the model, where it is less than the least work, the device knows how, and the option allows it."""
    plan = w.plan(training={"min_steps": 10, "steps": 20, "batch_size": 100})
    slow = w.beat(step_us=12_000_000)
    assert select([slow], plan=plan, abilities=["anchor"])[0].startswith("would need")
    assert select([slow], plan=plan, options={"anchors": 1.0})[0].startswith("would need")
    (choice,) = select([slow], plan=plan, options={"anchors": 1.0}, abilities=["anchor"])
    assert choice.role == "anchor"


def test_slow_or_capped_links_get_smaller_updates():
    """Down to a quarter of the plan's bytes, where the plan controls bytes at all."""
    beats = [w.beat(), w.beat(up_kbit_s=16), w.beat(up_kbit_s=1), w.beat(data_left_mb=2), w.beat(up_kbit_s=40)]
    plan = w.plan(uplink=Uplink(codec="default", budget_bytes=100_000), deadline_s=1000.0)
    fast, slow, slowest, capped, fair = select(beats, plan=plan, up_bytes=1_000_000, down_bytes=10_000)
    assert fast.byte_budget is None
    assert slow.byte_budget == 500_000
    assert slowest == "would need 2000 s of 1000 s even for the least work"
    assert capped.byte_budget == 250_000
    assert fair.byte_budget is None
    assert select([w.beat(up_kbit_s=40)], up_bytes=400_000)[0].byte_budget is None


class Statistics:
    """A bundle of one small matrix and many running statistics, which travel dense."""

    def layout(self):
        return Layout(("w", "mean"), ((20, 50), (400,)), frozenset({"mean"}))


def test_a_budget_must_hold_for_slow_links():
    """A plan whose smallest update the codec cannot make is refused, and the message names the option."""
    uplink = Uplink(codec="default", budget_bytes=1600)
    with pytest.raises(
        ConfigError, match=r"for slow links, where selector 'energy_aware' has least_update_share = 0.25"
    ):
        check_budgets(w.h.plan(uplink=uplink, selector="energy_aware"), Statistics())
    whole = {"least_update_share": 1.0}
    check_budgets(w.h.plan(uplink=uplink, selector="energy_aware", selector_options=whole), Statistics())


def test_half_of_the_places_go_by_score():
    """The most useful devices are in more often, and all share the even half."""
    rows = [w.past(number, loss_rms=3.0 if number < 2 else 1.0, counted=5) for number in range(10)]
    often = w.frequencies(
        make(), w.fleet([w.beat()] * 10), 10, seeds=200, count=2, attempt=1, history=w.histories(rows)
    )
    assert sum(often[:2]) / 2 > 1.4 * sum(often[2:]) / 8
    assert min(often) > 0.05


def test_single_places_are_shared_by_both_halves():
    """Runs that fill one place at a time still go by score half of the time; by score is four times at most."""
    rows = [w.past(number, loss_rms=3.0 if number < 2 else 0.0) for number in range(8)]
    often = w.frequencies(make(), w.fleet([w.beat()] * 8), 8, seeds=600, count=1, history=w.histories(rows), attempt=1)
    assert sum(often[:2]) == pytest.approx(0.5 * 8 / 14 + 0.5 * 2 / 8, abs=0.06)


@pytest.mark.parametrize(
    ("worse", "beat"),
    [
        ({"elapsed_s": 10.0}, w.beat(step_uj=8_000_000)),
        ({"elapsed_s": 10.0}, w.beat(step_us=2_000_000)),
        ({"queue_j": 1000.0}, w.beat()),
        ({"counted": 30}, w.beat()),
        ({"failures": 4, "last_round": 9}, w.beat()),
    ],
)
def test_every_factor_counts(worse, beat):
    """More joules, more seconds, a long energy queue, many turns and failures lower the score."""
    rows = [w.past(number, **(worse if number == 0 else {})) for number in range(4)]
    selection = make().select(
        0.0, w.fleet([beat, *[w.beat()] * 3]), w.request(2, 4, history=w.histories(rows), attempt=1)
    )
    scores = [selection.notes[w.name(number)].figures["score"] for number in range(4)]
    assert scores[0] < 0.8 * scores[1]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    drawn=st.lists(st.lists(st.none() | st.floats(0, 100), min_size=3, max_size=3), max_size=20),
    share=st.floats(0, 50),
)
def test_the_stored_queue_is_the_plain_recursion(drawn, share):
    """Changing only those who took part gives the same queues as walking over everybody every round."""
    plain, stored, before = [0.0] * 3, [0.0] * 3, 0.0
    for joules in drawn:
        for number, drew in enumerate(joules):
            plain[number] = max(0.0, plain[number] + (drew or 0.0) - share)
            if drew is not None:
                stored[number] = next_queue(stored[number], drew, before, share)
        before += share
        assert [max(0.0, value - before) for value in stored] == pytest.approx(plain, abs=1e-6)


def test_queues_follow_what_devices_draw():
    """Who draws more than its share owes; the share is everybody's; a claim beyond reason is bounded."""
    history, memory = w.histories([w.past(number, step_j=2.0) for number in range(10)]), {}
    outcomes = [w.outcome(0, joules=10.0), w.outcome(1), w.outcome(2, joules=1e12), w.outcome(3, failed=True)]
    assert close_round(outcomes, history, memory, 0.0) == [w.name(0), w.name(1), w.name(2)]
    shared = (10.0 + 20.0 + 16 * 20.0) / 10
    assert memory[SPENT] == pytest.approx(shared)
    queues = [max(0.0, history[w.name(number)].queue_j - memory[SPENT]) for number in range(4)]
    assert queues == [pytest.approx(expected, abs=1e-6) for expected in (0.0, 0.0, 320.0 - shared, 0.0)]
    assert close_round([], history, memory, 0.0) == []


def test_failed_jobs_are_paid_for():
    """Who was asked pays, whatever became of it; only what a device declined is free."""
    selector, memory = make(), {}
    history = w.histories([w.past(number, step_j=2.0 if number else None) for number in range(5)])
    endings = [
        w.outcome(0, failed=True),  # joules unknown: the round's median
        w.outcome(1, failed=True, steps=10),
        w.outcome(2, failed=True, declined=True),
        w.outcome(3),
        w.outcome(4, failed=True, steps=10),
        w.outcome(4),  # it came after all
    ]
    for ending in endings:
        selector.observe(ending.assignment.device, ending, memory)
    taken = [endings[3], endings[5]]
    changed = selector.round_closed(0, taken, history, memory)
    assert changed == [w.name(number) for number in (0, 1, 3, 4)]
    share = 4 * 20.0 / 5
    queues = [max(0.0, history[w.name(number)].queue_j - memory[SPENT]) for number in range(5)]
    assert queues == [pytest.approx(expected, abs=1e-6) for expected in (4.0, 4.0, 0.0, 4.0, 4.0)]
    assert memory[SPENT] == pytest.approx(share)
    assert selector.round_closed(1, [], history, memory) == []


def test_places_follow_recent_failures():
    """Of the over-commitment only what is needed is used; declined jobs do not count; late ones are not asked twice."""
    selector, fleet = make(adaptive_target=0.0, first_share=1.0), w.fleet([w.beat()] * 40)
    plan = w.plan(target=10, over_commit=1.5)
    memory: dict[str, float] = {}

    def places(**changes):
        return len(w.chosen(selector, fleet, w.request(15, 40, plan=plan, memory=dict(memory), **changes)))

    assert places() == 13
    for _ in range(100):
        selector.observe("d", w.outcome(0), memory)
        selector.observe("d", w.outcome(0, failed=True, declined=True), memory)
    assert places() == 11
    for _ in range(30):
        selector.observe("d", w.outcome(0, failed=True), memory)
    assert places() == 15
    assert places(attempt=1) == 15
    selector = make(first_share=1.0)
    assert places(expected_late=[(90.0, 100.0)] * 4) == 9
    assert places(expected_late=[(90.0, 100.0)] * 40) == 8


def test_the_selector_says_how_many_updates_close_its_round():
    """Its own share of the target, less the late updates that are due, and never more than it chose."""
    selector, plan = make(first_share=0.5), w.plan(target=10, over_commit=1.5)

    def wanted(total=40, **changes):
        request = w.request(min(15, total), total, **{"plan": plan, "memory": {"success": 0.8}, **changes})
        selection = selector.select(0.0, w.fleet([w.beat()] * total), request)
        return len(selection.choices), selection.wanted

    assert wanted() == (7, 5)
    assert wanted(memory={"success": 1.0}) == (5, 5)
    assert wanted(memory={"success": 0.8, "share": 1.0}) == (13, 10)
    assert wanted(expected_late=[(90.0, 100.0)]) == (5, 4)
    assert wanted(total=3) == (3, 3)
    assert wanted(plan=w.plan(target=10, over_commit=1.0)) == (5, 5)  # a plan without any has no late updates from it
    assert wanted(attempt=1) == (15, None)
    assert wanted(plan=w.plan(mode="buffered", target=10)) == (15, None)


def test_few_are_asked_while_the_loss_falls():
    """A share of the target is enough at first; whenever the loss stalls for a window of rounds it grows, up to all."""
    selector, fleet = make(first_share=0.5, share_step=0.25, stall_rounds=4, stall_gain=0.05), w.fleet([w.beat()] * 40)
    plan, memory = w.plan(target=10, over_commit=1.3), {"success": 1.0}

    def places() -> int:
        return len(w.chosen(selector, fleet, w.request(13, 40, plan=plan, memory=dict(memory))))

    def rounds(count: int, *losses: float | None) -> None:
        for _ in range(count):
            taken = [w.outcome(number, loss_rms=loss) for number, loss in enumerate(losses)]
            selector.round_closed(0, taken, {}, memory)

    assert places() == 5
    rounds(4, 2.0, 2.2, 1.8)
    rounds(4, 1.0, 1.2, 0.8)
    assert places() == 5
    rounds(4, 0.99, 1e30, None, float("nan"), 0.98)  # fallen by less than a twentieth, whatever one of them claims
    assert places() == 8
    rounds(4, 0.99)
    rounds(4, 0.99)
    assert places() == 10


def test_energy_of_a_job_is_kept():
    """A plan's joules per job cut the steps, so that training is not stopped in the middle."""
    training = Training(steps=10, min_steps=1, job_joules=6.0)
    (choice,) = select([w.beat()], plan=w.h.plan(training=training, deadline_s=100.0))
    assert choice.steps == 5
