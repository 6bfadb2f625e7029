"""Standing assignments of a virtual device: the device's own machine, and what carries out its effects."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.agent import standing

if TYPE_CHECKING:
    from coordinator.simulation.agent import VirtualAgent
    from coordinator.simulation.device import VirtualDevice
    from edge_runtime.agent.events import Effect
    from edge_runtime.messages import FromCoordinator, UpdateId


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

    def told(self, message: FromCoordinator) -> None:
        """The coordinator said something, of a standing assignment or not."""
        self._step(standing.told(message, self._device.world.timeline.now_s))

    def done(self, effect: Effect) -> None:
        """An effect of the job machine was carried out."""
        self._step(standing.done(effect, self._device.world.timeline.now_s))

    def look(self) -> None:
        """Something changed, or time has passed: pulls if it is time for that."""
        device = self._device
        if not self.state.held or not device.connected:
            return
        now = device.world.timeline.now_s
        moment = standing.chance(self.state, self._agent.state, now, device.conditions.known)
        if moment is not None:
            self._moment(moment)
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

    def _step(self, event: standing.Event | None) -> None:
        for effect in standing.step(self.state, event) if event is not None else ():
            if isinstance(effect, standing.Keep):
                self._kept = [msgspec.structs.replace(kept) for kept in self.state.kept()]
            else:
                self._device.world.to_server(self._device, "pull", effect.pull)
