"""Standing assignments at work: carries out what :mod:`.standing` decides. One file keeps them (``standing``).

A device without such an assignment does not load that machine.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.errors import StorageError
from edge_runtime.files import remove, write_durably
from edge_runtime.messages import Standing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    from edge_runtime.agent import standing
    from edge_runtime.agent.config import LimitsConfig
    from edge_runtime.agent.events import Effect
    from edge_runtime.agent.jobs import AgentState
    from edge_runtime.agent.limits import Known
    from edge_runtime.messages import FromCoordinator, Pull
    from edge_runtime.store.spool import Spool
    from edge_runtime.transport.link import Link
    from edge_runtime.transport.loop import Loop, Timer

log = logging.getLogger("edge.agent")

_FILE = "standing"


class StandingWork:
    """The standing assignments of one device. Not for several threads.

    Args:
        folder: the agent's state folder.
        limits: of the owner.
        random: of the jitter between pulls.
        loop: its clock and timers.
        spool: knows which numbers updates have.
        jobs: what the device works on.
        known: what it knows of itself now.
        link: nothing is asked for while it is down.
        send: says a pull to the coordinator.
    """

    def __init__(
        self,
        folder: Path,
        limits: LimitsConfig,
        random: Random,
        *,
        loop: Loop,
        spool: Spool,
        jobs: AgentState,
        known: Callable[[], Known],
        link: Link,
        send: Callable[[Pull], None],
    ) -> None:
        self._path, self._loop, self._jobs = folder / _FILE, loop, jobs
        self._known, self._link, self._send = known, link, send
        self._limits, self._random = limits, random
        self._timer: Timer | None = None
        self._unkept = False
        self.state: standing.StandingState | None = None
        if self._path.exists():
            self._begin().restore(_read(self._path), lambda key: spool.last_sequence(*key), loop.now())

    def told(self, message: FromCoordinator) -> None:
        """The coordinator said something, of a standing assignment or not."""
        if self.state is None and not isinstance(message, Standing):
            return
        from edge_runtime.agent import standing

        state = self.state or self._begin()
        event = standing.told(message, self._loop.now())
        if isinstance(message, Standing) and (message.run, message.assignment) not in state.held:
            log.info("run %s: takes up to %d steps whenever this device chooses", message.run, message.max_steps)
        if event is not None:
            self._step(state, event)

    def done(self, effect: Effect) -> None:
        """An effect of the job machine was carried out."""
        if self.state is not None:
            from edge_runtime.agent import standing

            event = standing.done(effect, self._loop.now())
            if event is not None:
                self._step(self.state, event)

    def look(self) -> None:
        """Something changed, or time has passed: pulls if it is time for that. Costs next to nothing if it is not."""
        if self.state is None or not self.state.held or not self._link.is_up:
            return
        from edge_runtime.agent import standing

        now = self._loop.now()
        moment = standing.chance(self.state, self._jobs, now, self._known)
        if moment is not None:
            self._step(self.state, moment)
        self._arm(now, self.state.next_s())

    def close(self) -> None:
        """Forgets its timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> standing.StandingState:
        from edge_runtime.agent import standing

        self.state = standing.StandingState(self._limits, self._random)
        return self.state

    def _arm(self, now: float, next_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(next_s - now, self.look) if next_s is not None and next_s > now else None

    def _step(self, state: standing.StandingState, event: standing.Event) -> None:
        from edge_runtime.agent import standing

        for effect in standing.step(state, event):
            match effect:
                case standing.Keep():
                    self._unkept = True
                    self._keep(state)
                case standing.SendPull(pull):
                    if self._keep(state):  # a number is on disk before anyone hears of it
                        log.info("run %s: asks for %d steps as update %d", pull.run, pull.steps, pull.sequence)
                        self._send(pull)

    def _keep(self, state: standing.StandingState) -> bool:
        if not self._unkept:
            return True
        try:
            if state.held:
                write_durably(self._path, msgspec.msgpack.encode(state.kept()))
            else:
                remove(self._path)
        except StorageError as error:
            log.error("%s", error)  # noqa: TRY400 - one line, the user's disk is full
            return False
        self._unkept = False
        return True


def _read(path: Path) -> list[standing.Kept]:
    from edge_runtime.agent import standing

    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=list[standing.Kept])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s: cannot be read (%s); the coordinator says again what it wants", path, error)
        return []
