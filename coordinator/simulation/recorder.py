"""Watches a simulated run: joules by job, what was decided, versions as they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coordinator import events as e
from coordinator.evaluation_numbers import accuracy, mean_loss
from coordinator.simulation.report import AssignmentReport, DeviceReport, Joules, VersionReport
from coordinator.simulation.store import BrokenRuleError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.simulation.store import MemoryStore
    from coordinator.simulation.world import World
    from edge_runtime.messages import UpdateId

_Key = tuple[str, int]  # assignment and sequence
_ENDS = ("failed", "declined", "cancelled")


class Recorder:
    """``trained``: jobs that devices finished."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.joules = Joules()
        self.by_device = [0.0] * len(world.traces.devices)
        self.trained = self.counted = self.lost_to_battery = 0
        self.versions: dict[int, VersionReport] = {}
        self.jobs: dict[_Key, AssignmentReport] = {}
        self._verdicts: dict[UpdateId, bool] = {}
        self._spent: dict[_Key, float] = {}  # also what comes after a job's verdict
        self._counted: set[_Key] = set()
        self._lost: set[_Key] = set()
        self._pulled: dict[str, _Key] = {}  # the last pull of every standing assignment
        self._answered: set[_Key] = set()  # pulls with an update

    def spend(self, device: int, key: _Key | None, kind: str, joules: float) -> None:
        """A device drew joules, for a job; in vain where there is none (what was broken off)."""
        if joules <= 0.0:
            return
        totals = self.joules
        if kind == "training":
            totals.training += joules
        elif kind == "radio":
            totals.radio += joules
        else:
            totals.idle_wait += joules
        self.by_device[device] += joules
        if key is not None:
            self._spent[key] = self._spent.get(key, 0.0) + joules
        if key is None or key in self._lost:
            totals.wasted += joules

    def saved(self, rows: Iterable[e.Row]) -> None:
        """The coordinator stored rows."""
        for row in rows:
            if isinstance(row, e.AssignmentRow):
                self._assignment(row)
            elif isinstance(row, e.UpdateRow):
                if row.update.assignment in self._pulled:
                    self._answered.add((row.update.assignment, row.update.sequence))
                if row.verdict == "counted":
                    self._counts((row.update.assignment, row.update.sequence))
                elif row.verdict == "refused":
                    self._waste((row.update.assignment, row.update.sequence))
            elif isinstance(row, e.RoundRow):
                self._round(row)
            elif isinstance(row, e.RunRow) and row.initial_test is not None and 0 in self.versions:
                self.versions[0].accuracy = accuracy(row.initial_test)
                self.versions[0].loss = mean_loss(row.initial_test)

    def _assignment(self, row: e.AssignmentRow) -> None:
        key = (row.assignment, row.sequence)
        if row.standing and key not in self.jobs:
            self._next_pull(key)
        if row.sequence >= 0:
            self.jobs[key] = AssignmentReport(
                round=row.round,
                device=row.device,
                steps=row.steps,
                role=row.role,
                version=row.version,
                assignment=row.assignment,
                sequence=row.sequence,
                outcome=row.status,
            )
        if row.status in _ENDS:
            self._waste(key)

    def _next_pull(self, key: _Key) -> None:
        """A device goes on with its standing assignment: a job before that without an update has failed."""
        before = self._pulled.get(key[0])
        self._pulled[key[0]] = key
        if before in self.jobs and before not in self._answered:
            self.jobs[before] = msgspec.structs.replace(self.jobs[before], outcome="failed")
            self._waste(before)
        self._answered.discard(before)

    def _counts(self, key: _Key) -> None:
        """All that its job draws, before and after this, is not wasted; it may have been given up, and come late."""
        self.counted += 1
        self._counted.add(key)
        if key in self._lost:
            self._lost.remove(key)
            self.joules.wasted -= self._spent.get(key, 0.0)

    def _waste(self, key: _Key) -> None:
        if key not in self._lost and key not in self._counted:
            self._lost.add(key)
            self.joules.wasted += self._spent.get(key, 0.0)

    def _round(self, row: e.RoundRow) -> None:
        known = self.versions.get(row.version)
        if known is None:
            server = self._world.server
            self.versions[row.version] = VersionReport(
                version=row.version,
                virtual_s=self._world.timeline.now_s,
                updates=row.updates,
                late_updates=row.late_updates,
                modelled_joules=msgspec.structs.replace(self.joules),
                trained=self.trained,
                counted=self.counted,
                lost_to_battery=self.lost_to_battery,
                bytes_up=server.bytes_up,
                bytes_down=server.bytes_down,
            )
        elif row.test is not None:
            known.accuracy, known.loss = accuracy(row.test), mean_loss(row.test)
        else:
            return
        self._world.version_made(self.versions[row.version])

    def begin(self) -> None:
        """The initial model is there."""
        self.versions[0] = VersionReport(version=0, virtual_s=0.0, modelled_joules=Joules())

    def told(self, update: UpdateId, *, counted: bool) -> None:
        """A device is told a verdict.

        Raises:
            BrokenRuleError: it was told another one before.
        """
        if self._verdicts.setdefault(update, counted) != counted:
            raise BrokenRuleError(f"update {update} got two verdicts")

    def end(self) -> None:
        """Whatever did not count until now never will."""
        for key in list(self._spent):
            self._waste(key)

    def outcomes(self, store: MemoryStore) -> tuple[dict[str, int], dict[str, DeviceReport], list[AssignmentReport]]:
        """Jobs by their end, devices with theirs, and the jobs, each with what became of it."""
        devices = {
            trace.device: DeviceReport(device=trace.device, modelled_joules=self.by_device[number])
            for number, trace in enumerate(self._world.traces.devices)
        }
        updates = {(name.assignment, name.sequence): row.verdict for name, row in store.updates.items()}
        counts: dict[str, int] = {}
        jobs = []
        for key, job in self.jobs.items():
            end = updates.get(key, job.outcome)
            device = devices[job.device]
            device.asked += 1
            if end in ("counted", "refused", *_ENDS):
                setattr(device, end, getattr(device, end) + 1)
            counts[end] = counts.get(end, 0) + 1
            jobs.append(msgspec.structs.replace(job, outcome=end))
        return counts, devices, jobs
