"""Standing assignments at work: carries out what :mod:`.standing` decides. One file keeps them (``standing``)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.agent import standing
from edge_runtime.errors import StorageError
from edge_runtime.files import write_durably

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    from edge_runtime.agent.config import LimitsConfig
    from edge_runtime.agent.jobs import AgentState
    from edge_runtime.agent.limits import Known
    from edge_runtime.messages import Pull, Standing
    from edge_runtime.store.spool import Spool
    from edge_runtime.transport.link import Link
    from edge_runtime.transport.loop import Loop, Timer

log = logging.getLogger("edge.agent")

_FILE = "standing"
_ENDED = ("run has ended", "its assignment is unknown")  # refusals after which nothing more comes of the assignment


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
        self._timer: Timer | None = None
        self._unkept = False
        self.state = standing.StandingState(limits, random)
        self.state.restore(_read(self._path), lambda key: spool.last_sequence(*key), loop.now())

    def arrived(self, wanted: Standing) -> None:
        """The coordinator gives a standing assignment, or says it again."""
        if (wanted.run, wanted.assignment) not in self.state.held:
            log.info("run %s: takes up to %d steps whenever this device chooses", wanted.run, wanted.max_steps)
        self._step(standing.StandingArrived(self._loop.now(), wanted))
        self.look()

    def cancelled(self, run: str, assignment: str) -> None:
        """The coordinator no longer wants it."""
        self._step(standing.StandingEnded(run, assignment))

    def refused(self, run: str, assignment: str, reason: str) -> None:
        """An update got the verdict that it does not count."""
        if reason.startswith(_ENDED):
            self._step(standing.StandingEnded(run, None if reason.startswith(_ENDED[0]) else assignment))

    def job_came(self, run: str, assignment: str, sequence: int) -> None:
        """A job arrived, of a standing assignment or not."""
        self._step(standing.JobCame(run, assignment, sequence))

    def job_ended(self, run: str, assignment: str, *, trained: bool) -> None:
        """A job ended, of a standing assignment or not; ``trained``: with an update."""
        self._step(standing.JobEnded(self._loop.now(), run, assignment, trained))

    def look(self) -> None:
        """Something changed, or time has passed: pulls if it is time for that. Costs next to nothing if it is not."""
        if not self.state.held or not self._link.is_up:
            return
        now, idle = self._loop.now(), not self._jobs.jobs
        unsettled = frozenset(name.run for name, update in self._jobs.updates.items() if update.trained)
        if self.state.may_pull(now, idle, unsettled):
            self._step(standing.Moment(now, idle, unsettled, self._known()))
        self._arm(now)

    def close(self) -> None:
        """Forgets its timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        next_s = self.state.next_s()
        self._timer = self._loop.call_later(next_s - now, self.look) if next_s is not None and next_s > now else None

    def _step(self, event: standing.Event) -> None:
        for effect in standing.step(self.state, event):
            match effect:
                case standing.Keep():
                    self._unkept = True
                    self._keep()
                case standing.SendPull(pull):
                    if self._keep():  # a number is on disk before anyone hears of it
                        log.info("run %s: asks for %d steps as update %d", pull.run, pull.steps, pull.sequence)
                        self._send(pull)

    def _keep(self) -> bool:
        if not self._unkept:
            return True
        try:
            write_durably(self._path, msgspec.msgpack.encode(self.state.kept()))
        except StorageError as error:
            log.error("%s", error)  # noqa: TRY400 - one line, the user's disk is full
            return False
        self._unkept = False
        return True


def _read(path: Path) -> list[standing.Kept]:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=list[standing.Kept])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s: cannot be read (%s); the coordinator says again what it wants", path, error)
        return []
