"""Standing assignments of a virtual device: the device's own machine, and what carries out its effects."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.agent import standing

if TYPE_CHECKING:
    from coordinator.simulation.agent import VirtualAgent
    from coordinator.simulation.device import VirtualDevice
    from edge_runtime.messages import Standing, UpdateId

_ENDED = ("run has ended", "its assignment is unknown")  # as in edge_runtime.agent.anarchic


class VirtualStanding:
    """What :class:`edge_runtime.agent.anarchic.StandingWork` is to a daemon."""

    __slots__ = ("_agent", "_device", "_kept", "_look_s", "_random", "state")

    def __init__(self, device: VirtualDevice, agent: VirtualAgent) -> None:
        self._device, self._agent = device, agent
        self._random = Random(f"{device.world.settings.seed}/{device.name}/standing")
        self._kept: list[standing.Kept] = []
        self.restart(())

    def restart(self, spooled: tuple[UpdateId, ...]) -> None:
        """After the agent's process ended: from what it kept, and the updates in its spool."""

        def used(key: standing.Key) -> int | None:
            return max((name.sequence for name in spooled if (name.run, name.assignment) == key), default=None)

        self.state = standing.StandingState(self._device.owner_limits, self._random)
        self.state.restore(self._kept, used, self._device.world.timeline.now_s)
        self._look_s = -1.0

    def arrived(self, wanted: Standing) -> None:
        """The coordinator gives a standing assignment, or says it again."""
        self._step(standing.StandingArrived(self._device.world.timeline.now_s, wanted))
        self.look()

    def cancelled(self, run: str, assignment: str) -> None:
        """The coordinator no longer wants it."""
        self._step(standing.StandingEnded(run, assignment))

    def refused(self, update: UpdateId, reason: str) -> None:
        """An update got the verdict that it does not count."""
        if reason.startswith(_ENDED):
            self._step(standing.StandingEnded(update.run, None if reason.startswith(_ENDED[0]) else update.assignment))

    def job_came(self, run: str, assignment: str, sequence: int) -> None:
        """A job arrived."""
        self._step(standing.JobCame(run, assignment, sequence))

    def job_ended(self, run: str, assignment: str, *, trained: bool) -> None:
        """A job ended."""
        self._step(standing.JobEnded(self._device.world.timeline.now_s, run, assignment, trained))

    def look(self) -> None:
        """Something changed, or time has passed: pulls if it is time for that."""
        device, jobs = self._device, self._agent.state
        if not self.state.held or not device.connected:
            return
        now, idle = device.world.timeline.now_s, not jobs.jobs
        unsettled = frozenset(name.run for name, update in jobs.updates.items() if update.trained)
        if self.state.may_pull(now, idle, unsettled):
            self._moment(standing.Moment(now, idle, unsettled, device.known()))
        next_s = self.state.next_s()
        if next_s is not None and next_s > now and next_s != self._look_s:
            self._look_s = next_s
            device.world.timeline.at(next_s, self._look_at, next_s)

    def _look_at(self, planned_s: float) -> None:
        if planned_s == self._look_s:
            self._look_s = -1.0
            self.look()

    def _moment(self, moment: standing.Moment) -> None:
        """With free steps the device wants any number up to the most; the machine takes what it can afford of them."""
        if not self._device.world.settings.free_steps:
            self._step(moment)
            return
        given = {key: held.standing for key, held in self.state.held.items()}
        for held in self.state.held.values():
            most = self._random.randint(held.standing.min_steps, held.standing.max_steps)
            held.standing = msgspec.structs.replace(held.standing, max_steps=most)
        self._step(moment)
        for key, held in self.state.held.items():
            held.standing = given[key]

    def _step(self, event: standing.Event) -> None:
        for effect in standing.step(self.state, event):
            if isinstance(effect, standing.Keep):
                self._kept = [msgspec.structs.replace(kept) for kept in self.state.kept()]
            else:
                self._device.world.to_server(self._device, "pull", effect.pull)
