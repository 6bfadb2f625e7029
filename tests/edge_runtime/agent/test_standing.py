"""Standing assignments: when a device asks for work by itself, and that its numbers never come twice."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent import standing as s
from edge_runtime.agent.config import LimitsConfig
from edge_runtime.agent.limits import Known
from edge_runtime.messages import BlobRef, Pull, Standing, UpdateId, Verdict

BUNDLE = BlobRef(sha256="ab" * 32, size_bytes=10)
LIMITS = LimitsConfig(battery_reserve_percent=20.0)
FULL, EMPTY = Known(battery_percent=90.0), Known(battery_percent=10.0)
NOBODY: frozenset[str] = frozenset()


def wanted(run: str = "run", **fields) -> Standing:
    return Standing(**{"run": run, "assignment": "a", "dataset": "d", "bundle": BUNDLE, "max_steps": 40, **fields})


def fresh() -> s.StandingState:
    return s.StandingState(LIMITS, Random(1))


def moment(state, now, *, idle=True, unsettled=NOBODY, known=FULL):
    return [e.pull for e in s.step(state, s.Moment(now, idle, unsettled, known)) if isinstance(e, s.SendPull)]


def test_it_asks_trains_and_asks_again():
    """A pull is noted before it is said; its job ends; after the interval comes the next, with the next number."""
    state = fresh()
    assert s.step(state, s.StandingArrived(0.0, wanted(sequence=3, interval_s=100.0))) == [s.Keep()]
    assert 0.0 <= state.next_s() <= 60.0
    assert s.step(state, s.Moment(60.0, True, NOBODY, FULL)) == [
        s.Keep(),
        s.SendPull(Pull(run="run", assignment="a", sequence=3, steps=40)),
    ]
    s.step(state, s.JobCame("run", "a", 3))
    assert state.next_s() is None
    assert moment(state, 1000.0, idle=False) == []
    assert s.step(state, s.JobEnded(110.0, "run", "a", True)) == [s.Keep()]
    assert moment(state, 159.0) == []
    assert [pull.sequence for pull in moment(state, 171.0)] == [4]


def test_it_waits_for_room_for_the_verdict_and_for_its_owner():
    """Nothing is pulled while a job is here, the run's last update has no verdict, or a limit forbids training."""
    state = fresh()
    s.step(state, s.StandingArrived(0.0, wanted()))
    assert moment(state, 1.0, idle=False) == []
    assert moment(state, 2.0, unsettled=frozenset({"run"})) == []
    assert moment(state, 3.0, known=EMPTY) == []
    assert moment(state, 4.0) == []  # it looks again after some seconds
    assert len(moment(state, 3.0 + s.LOOK_S, unsettled=frozenset({"other"}))) == 1


def test_a_pull_without_an_answer_is_said_again():
    """The same pull, ever more rarely; at once when the coordinator says that it does not know of it."""
    state = fresh()
    s.step(state, s.StandingArrived(0.0, wanted()))
    (first,) = moment(state, 0.0)
    said = [now for now in range(1, 1000) for pull in moment(state, float(now)) if pull == first]
    assert said[:4] == [30, 90, 210, 450]
    s.step(state, s.StandingArrived(1000.0, wanted()))
    assert moment(state, 1000.0) == [first]


def test_a_coordinator_that_never_answers_blocks_no_other():
    """A pull waits for its job for a minute; then another run may have the device."""
    state = fresh()
    for run in ("one", "two"):
        s.step(state, s.StandingArrived(0.0, wanted(run)))
    (first,) = moment(state, 0.0)
    assert {pull.run for pull in moment(state, 40.0)} == {first.run}
    assert {pull.run for pull in moment(state, 61.0)} == {"one", "two"} - {first.run}


def test_a_job_that_failed_is_asked_for_anew_ever_later():
    """With the next number, since the coordinator heard that this one ended, and for fewer steps: the deadline may be
    too short for more. When they go well there are more again."""
    state = fresh()
    s.step(state, s.StandingArrived(0.0, wanted()))
    now, waits = 0.0, []
    for number in range(4):
        (pull,) = moment(state, now)
        assert (pull.sequence, pull.steps) == (number, (40, 20, 10, 5)[number])
        s.step(state, s.JobCame("run", "a", number))
        s.step(state, s.JobEnded(now, "run", "a", False))
        waits.append(state.next_s() - now)
        now = state.next_s()
    assert waits == [30.0, 60.0, 120.0, 240.0]
    steps = []
    for number in range(4, 40):
        (pull,) = moment(state, now)
        steps.append(pull.steps)
        s.step(state, s.JobCame("run", "a", number))
        s.step(state, s.JobEnded(now, "run", "a", True))
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (2, 40)


def test_the_end_of_an_assignment_is_the_end_of_its_pulls():
    """One by one; what is not held changes nothing."""
    state = fresh()
    for run in ("one", "two"):
        s.step(state, s.StandingArrived(0.0, wanted(run)))
    assert s.step(state, s.StandingEnded("one", "a")) == [s.Keep()]
    assert s.step(state, s.StandingEnded("one", "a")) == []
    assert s.step(state, s.StandingEnded("two", "a")) == [s.Keep()]
    assert (moment(state, 99.0), state.kept()) == ([], [])


def test_only_a_verdict_that_says_so_ends_an_assignment():
    """Whatever its reason is worded like: a refusal of one update leaves the assignment, a counted one may end it."""
    update = UpdateId("run", "dev", "a", 3)
    for reason in ("run has ended: finished", "its assignment is unknown here, or too long ago to count"):
        assert s.told(Verdict(update=update, counted=False, reason=reason), 1.0) is None
    for counted in (False, True):
        assert s.told(Verdict(update=update, counted=counted, ends=True), 1.0) == s.StandingEnded("run", "a")


def test_a_flood_of_assignments_is_bounded():
    """However many a coordinator names, a device holds some dozens."""
    state = fresh()
    for number in range(1000):
        s.step(state, s.StandingArrived(0.0, wanted(f"run-{number}")))
    assert len(state.held) == s.HELD_LIMIT


class Device:
    """A machine with its disk: what is kept, the numbers that updates have, and what must hold."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.disk: list[s.Kept] = []
        self.used: dict[s.Key, int] = {}
        self.open: dict[str, s.Key] = {}  # by run: the update without a verdict
        self.queue: list[tuple[s.Key, int]] = []
        self.pulled: dict[s.Key, int] = {}
        self.now = 0.0
        self.restart()

    def restart(self) -> None:
        self.queue.clear()
        self.state = s.StandingState(LIMITS, Random(7))
        self.state.restore(self.disk, self.used.get, self.now)

    def send(self, event) -> None:
        known = event.known if isinstance(event, s.Moment) else FULL
        for effect in s.step(self.state, event):
            if isinstance(effect, s.Keep):
                self.disk = self.state.kept()
                continue
            pull, key = effect.pull, (effect.pull.run, effect.pull.assignment)
            if pull.sequence == self.pulled.get(key):
                continue  # said again
            assert known is FULL, "pulled although a limit forbids training"
            assert not self.queue, "pulled although a job is here"
            assert pull.run not in self.open, "pulled although an update has no verdict"
            assert pull.sequence > max(self.pulled.get(key, -1), self.used.get(key, -1)), "a number came twice"
            assert any((kept.standing.run, kept.sequence) == (pull.run, pull.sequence) for kept in self.disk)
            self.pulled[key] = pull.sequence

    def act(self) -> None:
        random = self.random
        self.now += random.choice([0.0, 1.0, 31.0, 300.0])
        run = random.choice(["one", "two"])
        key = (run, "a")
        match random.randrange(8):
            case 0:
                first = self.used.get(key, -1) + 1
                self.send(s.StandingArrived(self.now, wanted(run, sequence=first, interval_s=20.0)))
            case 1 | 2 | 3:
                known = random.choice([FULL, FULL, EMPTY])
                self.send(s.Moment(self.now, not self.queue, frozenset(self.open), known))
            case 4 if key in self.pulled and self.pulled[key] > self.used.get(key, -1) and not self.queue:
                self.queue.append((key, self.pulled[key]))
                self.send(s.JobCame(*key, self.pulled[key]))
            case 5 if self.queue and self.queue[0][0][0] not in self.open:
                key, number = self.queue.pop()
                trained = random.random() < 0.7
                if trained:
                    assert key[0] not in self.open, "a second update without a verdict"
                    self.used[key], self.open[key[0]] = number, key
                self.send(s.JobEnded(self.now, *key, trained))
            case 6:
                self.open.pop(run, None)
            case 7 if random.random() < 0.3:
                self.restart()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_numbers_never_come_twice_and_updates_one_at_a_time(seed):
    """Whatever arrives, fails or restarts: numbers only grow, limits hold, a run has one update without a verdict."""
    device = Device(seed)
    for _ in range(120):
        device.act()
