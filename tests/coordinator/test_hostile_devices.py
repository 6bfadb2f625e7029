"""Devices that lie, leave, come back after a week or change their clocks: no harm is done."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import events as e
from coordinator.histories import LONGEST_DECLINE_S, note_taken
from coordinator.plausibility import believed, implausible, trusted
from coordinator.rounds import step
from edge_runtime.messages import EnergyUse, Evaluation, Heartbeat, UpdateMeta
from tests.coordinator import helpers as h

DAY_S = 86_400.0


def asked(plan, *names):
    """A run that asked its first devices, its fleet, and the jobs by device."""
    state, fleet = h.start(plan), h.fleet(*names)
    return state, fleet, {row.device: row for row in h.jobs(step(state, e.Tick(0.0), fleet))}


ANY_NUMBER = st.floats(allow_nan=True, allow_infinity=True) | st.just(1e30) | st.none()
ANY_COUNT = st.integers(0, 1 << 62)


@given(ANY_NUMBER, st.tuples(ANY_COUNT, ANY_COUNT, ANY_COUNT), st.none() | ANY_COUNT, st.none() | st.integers(1, 100))
def test_whatever_a_device_says_a_history_holds_numbers_that_can_be_true(rms, counts, mj, wanted):
    """NaN, infinity, 1e30, a step in no time, joules of a power station: unknown, never a number."""
    samples, steps, ms = counts
    meta = UpdateMeta(
        round=0,
        model_version=0,
        samples=samples,
        steps=steps,
        train_ms=ms,
        loss_rms=rms,
        energy=None if mj is None else EnergyUse(train_mj=mj),
    )
    row = e.HistoryRow(run="r", device="a")
    job = e.AssignmentRow(
        run="r",
        assignment="r0-0",
        device="a",
        round=0,
        version=0,
        model=h.blob(1),
        steps=wanted,
        deadline_unix_s=9.0,
        assigned_unix_s=0.0,
    )
    for elapsed_s in (-1e9, 5.0, 1e12):
        note_taken(row, job, meta, elapsed_s=elapsed_s, deadline_s=100.0)
        assert row.loss_rms is None or 0 <= row.loss_rms <= 1e6
        assert row.samples is None or row.samples <= 1e9
        assert row.step_s is None or 1e-6 <= row.step_s <= DAY_S
        assert row.step_j is None or 0 <= row.step_j <= 1e9
        assert 0 <= row.elapsed_s <= 1000.0


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"samples": 10**10}, "claims 10000000000 samples"),
        ({"steps": 11}, "claims 11 steps where 10 were asked for"),
        ({"train_ms": 1 << 60}, "milliseconds"),
    ],
)
def test_what_would_reach_the_model_is_refused_by_name(said, reason):
    """Samples and steps weigh updates; what cannot be true does not count."""
    meta = UpdateMeta(**{"round": 0, "model_version": 0, "samples": 10, "steps": 10, **said})
    assert reason in implausible(meta, 10)
    assert implausible(UpdateMeta(round=0, model_version=0, samples=10, steps=10, loss=1.0), 10) == ""


@pytest.mark.parametrize(
    ("said", "doubt"),
    [
        ({"loss_rms": 1e30}, "a root mean squared loss of 1e+30"),
        ({"loss_rms": math.nan}, "loss of nan"),
        ({"loss": math.nan}, "a loss of nan"),
        ({"loss": -1e7}, "a loss of -1e+07"),
        ({"evaluation": Evaluation(samples=5, loss_sum=math.inf)}, "a sum of losses of inf over 5 samples"),
        ({"evaluation": Evaluation(samples=5, loss_sum=6e6)}, "a sum of losses of 6e+06 over 5 samples"),
        ({"evaluation": Evaluation(samples=0, loss_sum=1.0)}, "a sum of losses of 1 over 0 samples"),
        ({"evaluation": Evaluation(samples=5, loss_sum=1.0, correct=6)}, "6 correct of 5 samples"),
        ({"evaluation": Evaluation(samples=10**12, loss_sum=1.0)}, "an evaluation of 1000000000000 samples"),
        ({"steps": 10**9, "train_ms": 1}, "1000000000 steps in 0.001 s"),
        ({"energy": EnergyUse(train_mj=10**15)}, "1e+12 J in 100 s"),
    ],
)
def test_what_only_a_selector_would_believe_is_unknown(said, doubt):
    """The update counts, the figure does not; the doubt is there for the log."""
    meta = UpdateMeta(**{"round": 0, "model_version": 0, "samples": 10, "steps": 5, "train_ms": 1000, **said})
    facts, kept = believed(meta, steps=None, elapsed_s=100.0), trusted(meta)
    assert doubt in facts.doubts[0]
    assert implausible(meta) == ""
    assert None in (facts.loss_rms, facts.step_s, facts.step_j)
    for name in said.keys() & {"loss", "loss_rms", "evaluation"}:
        assert getattr(kept, name) is None


def closed(said, honest, **changes):
    """The record of a round of four devices, the first of which says what it likes."""
    state, fleet, jobs = asked(h.plan(target=4, rounds=3, **changes), *"abcd")
    for number, row in enumerate(jobs.values()):
        effects = step(state, h.arrived(row, 1.0 + number, **(said if not number else honest)), fleet)
    assert len(h.one(e.Aggregate, effects).updates) == 4
    rows = h.one(e.Save, step(state, e.Aggregated(9.0, 0, h.blob(9)), fleet)).rows
    return next(row for row in rows if isinstance(row, e.RoundRow)), rows


@pytest.mark.parametrize(
    "said",
    [
        {"loss": 1e30, "samples": 10**9, "evaluation": Evaluation(samples=10**9, loss_sum=1e30, correct=0)},
        {"loss": math.nan, "evaluation": Evaluation(samples=8, loss_sum=math.nan, correct=8)},
        {"loss": -math.inf, "evaluation": Evaluation(samples=8, loss_sum=-math.inf, correct=8)},
        {"loss": 2e6, "evaluation": Evaluation(samples=8, loss_sum=1.0, correct=9)},
        {"loss": 1e99, "evaluation": Evaluation(samples=8, loss_sum=1e8, correct=2)},
        {"evaluation": Evaluation(samples=0, loss_sum=5.0, correct=10**9)},
        {"loss": 0.5, "evaluation": Evaluation(samples=10**9, loss_sum=0.0)},
    ],
)
def test_a_lie_about_losses_is_in_no_record_of_a_round(said):
    """Its numbers are unknown, its update counts, and the round's are those of the others; all of it can be stored."""
    honest = {"loss": 0.5, "evaluation": Evaluation(samples=4, loss_sum=2.0, correct=3)}
    record, rows = closed(said, honest)
    assert record.train_loss == pytest.approx(0.5)
    assert record.devices == Evaluation(samples=12, loss_sum=6.0, correct=9)
    metas = [row.meta for row in rows if isinstance(row, e.UpdateRow)]
    assert msgspec.json.decode(msgspec.json.encode(metas), type=list[UpdateMeta]) == metas


def test_what_a_refused_update_says_can_be_stored_and_read_again():
    """A loss that is not finite has no place in the store, whatever becomes of its update."""
    state, fleet, jobs = asked(h.plan(target=2), "a", "b")
    said = {"loss": math.nan, "evaluation": Evaluation(samples=8, loss_sum=math.nan), "samples": 0}
    effects = step(state, h.arrived(jobs["a"], **said), fleet)
    (row,) = [row for row in h.one(e.Save, effects).rows if isinstance(row, e.UpdateRow)]
    assert row.verdict == "refused"
    assert msgspec.json.decode(msgspec.json.encode(row.meta), type=UpdateMeta) == row.meta


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_a_device_back_after_a_week_is_refused_by_name_and_gets_new_work(mode):
    """Its assignment is long forgotten: the old update cannot count, and the device is as good as any other."""
    plan = h.plan(mode=mode, rounds=9, target=1, over_commit=2.0, max_staleness=1)
    state, fleet, jobs = asked(plan, "a", "b")
    fleet.announce(1.0, h.device("b", online=False))
    step(state, e.DeviceLeft(1.0, "b"), fleet)
    job = jobs["a"]
    for round_ in range(4):
        step(state, h.arrived(job, 100.0 * round_ + 2.0), fleet)
        effects = step(state, e.Aggregated(100.0 * round_ + 3.0, round_, h.blob(20 + round_)), fleet)
        job = next(row for row in h.jobs(effects) if row.device == "a")
    now = 7 * DAY_S
    fleet.announce(now, h.device("b", session="s2"))
    effects = step(state, e.DeviceJoined(now, "b"), fleet)
    old = h.update_id(jobs["b"])
    answer = step(state, e.UpdateOffered(now, old, h.blob(9), h.meta(jobs["b"])), fleet)
    assert e.AnswerFromStore(old, ends=True) in answer
    assert any(row.device == "b" and row.version == 4 for row in [*h.jobs(effects), *h.jobs(answer)])
    assert old not in state.updates


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_the_coordinators_clock_may_be_set_back_by_a_day(mode):
    """Deadlines and pauses move with it: nothing waits for a day that already was."""
    plan = h.plan(mode=mode, rounds=9, target=2, minimum=1)
    state, fleet, _ = asked(plan, "a", "b", "c")
    base = 10 * DAY_S
    state.bound_times(0.0)
    step(state, e.Tick(base), fleet)
    open_rows = [row for row in state.assignments.values() if row.status == "open"]
    step(state, h.arrived(open_rows[0], base + 1.0), fleet)
    step(state, e.JobReported(base + 2.0, open_rows[1].device, open_rows[1].assignment, "too hot"), fleet)
    now = base - DAY_S
    effects = []
    for second in range(0, 400, 10):
        effects += step(state, e.Tick(now + second), fleet)
    assert h.of(e.Aggregate, effects)
    history = state.histories[open_rows[1].device]
    assert history.not_before_unix_s <= now + 60.0
    (effect,) = h.of(e.Aggregate, effects)[:1]
    closed = step(state, e.Aggregated(now + 401.0, effect.round, h.blob(20)), fleet)
    record = next(row for row in h.one(e.Save, closed).rows if isinstance(row, e.RoundRow))
    assert record.closed_unix_s >= record.opened_unix_s


def test_the_coordinators_clock_may_be_set_forward_by_a_day():
    """That is at most one deadline too early; no device is blamed, and no figure of a device is spoilt."""
    state, fleet, jobs = asked(h.plan(rounds=9, target=2, minimum=1), "a", "b")
    step(state, h.arrived(jobs["a"], 1.0), fleet)
    effects = step(state, e.Tick(DAY_S), fleet)
    assert h.of(e.Aggregate, effects)
    step(state, h.arrived(jobs["b"], DAY_S + 1.0), fleet)
    row = state.histories["b"]
    assert (row.failures, row.counted) == (0, 1)
    assert row.elapsed_s <= 1000.0


def test_after_a_restart_no_pause_outlives_what_it_could_have_been():
    """The new process does not know by how much the clock was set back, so what is ahead is bounded."""
    state, fleet, jobs = asked(h.plan(target=1), "a")
    step(state, e.JobReported(DAY_S, "a", jobs["a"].assignment, "too hot"), fleet)
    rows = state.bound_times(5.0)
    assert state.histories["a"] in rows
    assert state.histories["a"].not_before_unix_s <= 5.0 + LONGEST_DECLINE_S
    assert state.run.deadline_unix_s <= 5.0 + 100.0


def test_a_devices_clock_decides_nothing():
    """Whatever year it thinks it is, the same devices get the same work."""
    chosen = []
    for clock in (0, 1_700_000_000, 0xFFFFFFFF):
        state, fleet = h.start(h.plan(target=2)), h.fleet(*"abcd")
        for name in "abcd":
            fleet.measured(0.0, name, Heartbeat(clock_unix_s=clock, clock_synchronised=False))
        chosen.append(h.jobs(step(state, e.Tick(0.0), fleet)))
    assert chosen[0] == chosen[1] == chosen[2]
