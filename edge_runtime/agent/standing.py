"""When a device takes up a standing assignment, and with how many steps: a pure machine beside :mod:`.jobs`.

A standing assignment is worked on again and again, whenever the device chooses: nothing trains or waits here, the last
update of that run has its verdict, the owner's limits allow it, and the interval has passed. It then sends a
:class:`~edge_runtime.messages.Pull` with a number that it never used before, and gets a job with that number. A pull is
said again until its job comes; when that ends, whatever became of it, the next pull has the next number.

``step(state, event)`` changes the state and gives effects, in order; what :class:`Keep` writes makes the numbers grow
also over restarts. The events come from :func:`told`, :func:`done` and :func:`chance`; the daemon
(:mod:`.anarchic`) and the simulator carry out the same effects.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from edge_runtime.agent import events
from edge_runtime.agent.config import LimitsConfig
from edge_runtime.agent.limits import Known, standing_steps
from edge_runtime.messages import Cancel, Job, Pull, Standing, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edge_runtime.agent.jobs import AgentState
    from edge_runtime.messages import FromCoordinator

HELD_LIMIT = 64
AGAIN_S, AGAIN_LIMIT_S = 30.0, 600.0  # until a pull without an answer is said again
LOOK_S = 10.0  # until limits that forbid training now are looked at again
FIRST_S = 60.0  # at most, until the first pull: a fleet that is told at once does not pull at once
JITTER = 0.1  # of the interval
FAILED_S, FAILED_LIMIT_S = 30.0, 3600.0

Key: TypeAlias = tuple[str, str]  # run, assignment


class Held(msgspec.Struct):
    """One standing assignment. ``sequence`` is the number of the open pull, else of the next one.

    ``steps``: what the open pull asks for; 0: none is open. ``began``: its job came. ``next_s``: when to pull, or to
    say the open pull again. ``most``: after a job that failed or was declined, fewer steps than the assignment allows.
    """

    standing: Standing
    sequence: int
    steps: int = 0
    began: bool = False
    pulled_s: float = 0.0
    next_s: float = 0.0
    wait_s: float = AGAIN_S
    failures: int = 0
    most: int | None = None


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What of it is on disk."""

    standing: Standing
    sequence: int
    steps: int


class StandingState(msgspec.Struct):
    """Everything the machine remembers between events."""

    limits: LimitsConfig
    random: Random
    held: dict[Key, Held] = {}

    def kept(self) -> list[Kept]:
        """What has to be on disk."""
        return [Kept(held.standing, held.sequence, held.steps) for held in self.held.values()]

    def restore(self, kept: Iterable[Kept], used: Callable[[Key], int | None], now: float) -> None:
        """After a restart.

        Args:
            kept: from disk.
            used: the highest number that an update of an assignment has in the spool.
            now: by the loop's clock.
        """
        for entry in kept:
            key = (entry.standing.run, entry.standing.assignment)
            last = used(key)
            held = Held(entry.standing, entry.sequence, entry.steps, next_s=now)
            if last is not None and last >= entry.sequence:
                held.sequence, held.steps = last + 1, 0
            if not held.steps:
                held.next_s = now + self.random.random() * entry.standing.interval_s
            self.held[key] = held

    def next_s(self) -> float | None:
        """When there will be something to do; None: not before another event."""
        return min((held.next_s for held in self.held.values() if not held.began), default=None)

    def may_pull(self, now: float, idle: bool, unsettled: frozenset[str]) -> bool:
        """Whether a :class:`Moment` could do anything now."""
        return any(
            held.next_s <= now and not held.began and (held.steps or (idle and held.standing.run not in unsettled))
            for held in self.held.values()
        )


# Events
class StandingArrived(msgspec.Struct, frozen=True):
    """The coordinator gives a standing assignment, or says it again."""

    now: float
    standing: Standing


class StandingEnded(msgspec.Struct, frozen=True):
    """A standing assignment is over."""

    run: str
    assignment: str


class JobCame(msgspec.Struct, frozen=True):
    """A job arrived; of a standing assignment it answers the open pull."""

    run: str
    assignment: str
    sequence: int


class JobEnded(msgspec.Struct, frozen=True):
    """The job of a standing assignment ended; ``trained``: its update is durable."""

    now: float
    run: str
    assignment: str
    trained: bool


class Moment(msgspec.Struct, frozen=True):
    """The link is up, and time has passed.

    ``idle``: no job trains or waits. ``unsettled``: runs with an update that has no verdict yet.
    """

    now: float
    idle: bool
    unsettled: frozenset[str]
    known: Known


Event: TypeAlias = StandingArrived | StandingEnded | JobCame | JobEnded | Moment


# Effects
class Keep(msgspec.Struct, frozen=True):
    """Make the state durable, before any later effect."""


class SendPull(msgspec.Struct, frozen=True):
    """Say this to the coordinator."""

    pull: Pull


Effect: TypeAlias = Keep | SendPull


def told(message: FromCoordinator, now: float) -> Event | None:
    """What a message of the coordinator means for standing assignments; None: nothing."""
    match message:
        case Standing():
            return StandingArrived(now, message)
        case Job(run=run, assignment=assignment, sequence=sequence):
            return JobCame(run, assignment, sequence)
        case Cancel(run=run, assignment=assignment):
            return StandingEnded(run, assignment)
        case Verdict(update=update, ends=True):
            return StandingEnded(update.run, update.assignment)
        case _:
            return None


def done(effect: events.Effect, now: float) -> Event | None:
    """What it means that an effect of the job machine was carried out; None: nothing."""
    match effect:
        case events.SpoolUpdate(spooled):
            return JobEnded(now, spooled.update.run, spooled.update.assignment, trained=True)
        case events.Report(status):
            return JobEnded(now, status.run, status.assignment, trained=False)
        case _:
            return None


def chance(state: StandingState, jobs: AgentState, now: float, known: Callable[[], Known]) -> Moment | None:
    """The moment, if anything could be pulled now; only then it is looked up what the device knows of itself."""
    idle = not jobs.jobs
    unsettled = frozenset(name.run for name, update in jobs.updates.items() if update.trained)
    return Moment(now, idle, unsettled, known()) if state.may_pull(now, idle, unsettled) else None


def step(state: StandingState, event: Event) -> list[Effect]:
    """Changes ``state`` by one event and gives what to do, in order."""
    match event:
        case StandingArrived(now, standing):
            return _arrived(state, now, standing)
        case StandingEnded(run, assignment):
            return [Keep()] if state.held.pop((run, assignment), None) is not None else []
        case JobCame(run, assignment, sequence):
            held = state.held.get((run, assignment))
            if held is not None and held.steps and held.sequence == sequence:
                held.began = True
            return []
        case JobEnded():
            return _ended(state, event)
        case Moment():
            return _say_again(state, event.now) + _pull(state, event)


def _arrived(state: StandingState, now: float, standing: Standing) -> list[Effect]:
    key = (standing.run, standing.assignment)
    held = state.held.get(key)
    if held is None:
        if len(state.held) < HELD_LIMIT:
            first_s = now + state.random.random() * min(standing.interval_s, FIRST_S)
            state.held[key] = Held(standing, standing.sequence, next_s=first_s)
        return [Keep()]
    held.standing = standing
    if standing.sequence > held.sequence and not held.began:  # what this device knew is older
        held.sequence, held.steps = standing.sequence, 0
    if held.steps and not held.began:  # the coordinator may not have heard of it
        held.next_s, held.wait_s = now, AGAIN_S
    return [Keep()]


def _ended(state: StandingState, event: JobEnded) -> list[Effect]:
    held = state.held.get((event.run, event.assignment))
    if held is None or not held.began:
        return []
    held.failures, held.most = (0 if event.trained else held.failures + 1), _most(held, trained=event.trained)
    held.sequence, held.steps, held.began = held.sequence + 1, 0, False
    held.next_s = held.pulled_s + held.standing.interval_s * (1.0 + JITTER * state.random.random())
    if held.failures:
        held.next_s = max(held.next_s, event.now + min(FAILED_S * 2.0 ** (held.failures - 1), FAILED_LIMIT_S))
    return [Keep()]


def _most(held: Held, *, trained: bool) -> int | None:
    """Half as many steps after a failure (its deadline may be too short for more), then slowly more again."""
    if not trained:
        return max(held.standing.min_steps, held.steps // 2)
    more = None if held.most is None else held.most + max(1, held.most // 8)
    return None if more is None or more >= held.standing.max_steps else more


def _say_again(state: StandingState, now: float) -> list[Effect]:
    effects: list[Effect] = []
    for held in state.held.values():
        if held.steps and not held.began and held.next_s <= now:
            held.next_s, held.wait_s = now + held.wait_s, min(2.0 * held.wait_s, AGAIN_LIMIT_S)
            effects.append(_say(held))
    return effects


def _pull(state: StandingState, event: Moment) -> list[Effect]:
    """At most one at a time, the one that waits for longest; a pull that nobody answers blocks no other for ever."""
    now = event.now
    if not event.idle or any(held.steps and now - held.pulled_s < 2.0 * AGAIN_S for held in state.held.values()):
        return []
    for held in sorted(state.held.values(), key=lambda held: held.next_s):
        if held.steps or held.next_s > now or held.standing.run in event.unsettled:
            continue
        of = held.standing
        if held.most is not None and held.most < of.max_steps:
            of = msgspec.structs.replace(of, max_steps=max(held.most, of.min_steps))
        steps = standing_steps(of, event.known, state.limits)
        if not steps:
            held.next_s = now + LOOK_S
            continue
        held.steps, held.began, held.pulled_s = steps, False, now
        held.next_s, held.wait_s = now + AGAIN_S, 2.0 * AGAIN_S
        return [Keep(), _say(held)]
    return []


def _say(held: Held) -> SendPull:
    of = held.standing
    return SendPull(Pull(run=of.run, assignment=of.assignment, sequence=held.sequence, steps=held.steps))
