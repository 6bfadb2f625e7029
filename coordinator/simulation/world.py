"""The virtual world of one run: time, network and faults around one coordinator and many devices."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import msgspec

from coordinator.simulation.conditions import see
from coordinator.simulation.device import VirtualDevice
from coordinator.simulation.faults import (
    HALF,
    JUMPING_DEVICES,
    LARGEST_JUMP_S,
    LONGEST_DELAY_S,
    LONGEST_DOWN_S,
    LONGEST_LOSS_S,
    Faults,
)
from coordinator.simulation.owner import OwnerLimits
from coordinator.simulation.recorder import Recorder
from coordinator.simulation.report import Progress
from coordinator.simulation.server import VirtualServer
from coordinator.simulation.settings import STALLED_S
from coordinator.simulation.timeline import Timeline
from edge_runtime import compression, methods
from edge_runtime.agent.availability import Availability
from edge_runtime.agent.hours import DAY_S
from edge_runtime.agent.jobs import Capabilities
from edge_runtime.messages import EnergySource, Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from random import Random

    from coordinator.events import RunRow
    from coordinator.executors.base import Executor
    from coordinator.plan import Plan
    from coordinator.simulation.data import Shares
    from coordinator.simulation.faults import FaultPlan, Kind
    from coordinator.simulation.report import VersionReport
    from coordinator.simulation.settings import Settings
    from coordinator.simulation.store import MemoryStore
    from coordinator.simulation.traces import DeviceTrace, Traces
    from coordinator.simulation.training import Trainer
    from edge_runtime.agent.config import LimitsConfig
    from edge_runtime.bundle import Bundle
    from edge_runtime.messages import BlobRef, Evaluation, FromCoordinator

_BLOB_LIMIT_BYTES = 500_000_000
STALL_LOOK_S = 60.0
DEADLINES_OF_SILENCE = 6  # one more than after which a coordinator itself gives up devices that do not answer
PROGRESS_S = 5.0  # of this machine, between two lines
EVENTS_OF_A_LOOK = 64
_STEPS_OF_A_JOB, _STEPS_OF_A_ROUND = 3, 10  # of the round machine, roughly: so faults fall all over the run


class World:
    """Everything of one run. ``run_to_end`` is all there is to do.

    Args:
        plan: of the run.
        run: its row, as it was submitted.
        bundle: of the plan.
        traces: of the devices.
        settings: of this world.
        faults: what goes wrong.
        store: of the coordinator.
        trainer: makes updates.
        shares: of the data, None without training.
        evaluate: begins the evaluation of a model on the test set.
        executor: decodes and sums updates; None: this process.
        on_version: is told of every version, again when it was evaluated; true ends the run.
        on_progress: is told every few seconds of this machine how far the run is.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        run: RunRow,
        bundle: Bundle,
        traces: Traces,
        settings: Settings,
        faults: FaultPlan,
        store: MemoryStore,
        trainer: Trainer,
        shares: Shares | None,
        evaluate: Callable[[BlobRef], Future[Evaluation]],
        executor: Executor | None,
        on_version: Callable[[VersionReport], bool] | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.plan, self.bundle, self.traces, self.settings = plan, bundle, traces, settings
        self.timeline = Timeline()
        self.trainer, self.shares, self.evaluate = trainer, shares, evaluate
        self.executor = executor
        self.broker_up = True
        self.horizon_s = math.inf if settings.limit_s is None else settings.limit_s
        self.result: tuple[str, str] | None = None
        self._on_version, self._on_progress = on_version, on_progress
        self._version_s = 0.0  # when the newest version was made
        self._stalled = False
        self._empty_s = math.inf  # since when it is known that no device will ever be there again
        self._enough = False
        expected = plan.rounds * (plan.participation.target * _STEPS_OF_A_JOB + _STEPS_OF_A_ROUND)
        self.faults = Faults(faults, settings.seed, expected, self._strike)
        self.recorder = Recorder(self)
        self.codecs = sorted(compression.codec_names())
        self.methods = sorted(methods.method_names())
        self.backends = ["onnxruntime"]
        self.abilities = ["standing", "anchor"]
        self.limits = Limits(blob_bytes=_BLOB_LIMIT_BYTES, worker_memory_bytes=0)
        self.energy_source = EnergySource(sensor="model", scope="modelled", quality="modelled")
        self.capabilities = Capabilities(
            datasets=frozenset([plan.dataset]),
            codecs=frozenset(self.codecs),
            methods=frozenset(self.methods),
            blob_limit_bytes=_BLOB_LIMIT_BYTES,
        )
        self._histories: dict[tuple[str, float, bool, str | None], bytes] = {}
        self._limits: dict[tuple[OwnerLimits | None, float | None], LimitsConfig] = {}
        self.server = VirtualServer(self, store, run)
        self.devices = [VirtualDevice(self, number, trace) for number, trace in enumerate(traces.devices)]
        self.by_name = {device.name: device for device in self.devices}

    def run_to_end(self) -> int:
        """Lets time pass until the run has ended; gives how much happened."""
        for device in self.devices:
            device.begin()
        self.recorder.begin()
        self.server.start()
        self.timeline.at(self.settings.tick_s, self.server.tick)
        self.timeline.at(STALL_LOOK_S, self._look_for_stall)
        if self.settings.limit_s is not None:
            self.timeline.at(self.settings.limit_s, self._time_is_up)
        count, step = 0, self.timeline.step
        began_s = told_s = time.perf_counter()
        while self.result is None and step():
            count += 1
            if self._on_progress is not None and not count % EVENTS_OF_A_LOOK:
                now_s = time.perf_counter()
                if now_s - told_s >= PROGRESS_S:
                    told_s = now_s
                    self._on_progress(self._progress(now_s - began_s))
        for device in self.devices:
            device.end()
        return count

    def _progress(self, wall_s: float) -> Progress:
        recorder = self.recorder
        return Progress(
            version=max(recorder.versions), virtual_s=self.timeline.now_s, wall_s=wall_s, trained=recorder.trained
        )

    def ended(self, status: str, reason: str) -> None:
        """The coordinator says that the run has ended."""
        self.result = "stalled" if self._stalled else status, reason

    def _look_for_stall(self) -> None:
        """Ends a run that waits for devices of which none can ever come, or that has made no version for long."""
        now_s, server = self.timeline.now_s, self.server
        if server.up and server.state is not None:
            reason = ""
            if any(device.here or device.may_come for device in self.devices):
                self._empty_s = math.inf
            else:  # whatever the coordinator still makes of what it has, it makes within its deadlines
                self._empty_s = min(self._empty_s, now_s)
            last_s = self._empty_s + DEADLINES_OF_SILENCE * self.plan.participation.deadline_s
            if now_s >= (self._empty_s if server.waits else last_s):
                reason = (
                    "no device will ever be there again, by its trace and its battery; give batteries charge_watts "
                    "and spans of charging, and devices spans online"
                )
            elif self.settings.limit_s is None and now_s - self._version_s >= STALLED_S:
                reason = (
                    f"no version was made in {STALLED_S / DAY_S:g} days of virtual time: look at deadlines, owners' "
                    "limits and presence; with --limit-hours a run goes on for that long"
                )
            if reason:
                self._stalled = True
                server.stop(reason)
        self.timeline.at(now_s + STALL_LOOK_S, self._look_for_stall)

    def _time_is_up(self) -> None:
        if self.server.up:
            self.server.stop(f"the simulated time of {self.settings.limit_s:g} s is over")
        else:
            self.timeline.at(self.timeline.now_s + self.settings.tick_s, self._time_is_up)

    def version_made(self, version: VersionReport) -> None:
        """A version was made or evaluated."""
        self._version_s = max(self._version_s, version.virtual_s)
        if self._on_version is not None and self._on_version(version) and not self._enough:
            self._enough = True
            self.timeline.at(self.timeline.now_s, self._stop_now)

    def _stop_now(self) -> None:
        self.server.stop("enough, says the caller")

    def samples(self, number: int) -> int:
        """Training samples of a device."""
        if self.shares is not None:
            return self.shares.count(number)
        return self.traces.devices[number].samples or self.settings.samples

    def limits_of(self, trace: DeviceTrace) -> LimitsConfig:
        """What the owner of a device has set."""
        reserve = trace.reserve_percent if self.settings.keep_reserve and trace.battery_wh is not None else None
        key = (trace.limits, reserve)
        known = self._limits.get(key)
        if known is None:
            known = OwnerLimits().config() if trace.limits is None else trace.limits.config()
            if known.battery_reserve_percent is None:
                known = msgspec.structs.replace(known, battery_reserve_percent=reserve)
            self._limits[key] = known
        return known

    def presence_before(self, trace: DeviceTrace, limits: LimitsConfig) -> bytes:
        """What a device has learned of its own presence before the run; the same for all that follow one trace."""
        key = (trace.presence, trace.presence_offset_s, limits.only_when_charging, limits.hours)
        known = self._histories.get(key)
        if known is None:
            table = Availability()
            see(table, self.traces.presences[key[0]], key[1], -self.settings.history_days * DAY_S, 0.0, limits=limits)
            known = self._histories[key] = table.pack()
        return known

    def clock_offset_s(self, number: int) -> float:
        """By how much the clock of a device is wrong at the start."""
        return (number * 7919 % 97 - 48) * 3600.0 if self.faults.plan.clock else 0.0

    # Network

    def to_server(self, device: VirtualDevice, leaf: str, content: Any, *, latency_s: float | None = None) -> None:
        """Sends what a device says on its way."""
        at = self.timeline.now_s + (device.latency_s if latency_s is None else latency_s)
        self.timeline.at(at, self.server.receive, device, leaf, content)
        again = self.faults.repeat_after_s()
        if again is not None and leaf != "state":  # the broker keeps the newest state: an old one never comes after it
            self.timeline.at(at + again, self.server.receive, device, leaf, content)

    def to_device(self, device: VirtualDevice, message: FromCoordinator) -> None:
        """Sends what the coordinator says on its way."""
        at = self.timeline.now_s + device.latency_s
        self.timeline.at(at, device.receive, device.session, message)
        again = self.faults.repeat_after_s()
        if again is not None:
            self.timeline.at(at + again, device.receive, device.session, message)

    # Faults

    def _strike(self, kind: Kind, random: Random) -> None:
        if kind == "broker":
            self.timeline.at(self.timeline.now_s, self._lose_broker, random.uniform(0.1, LONGEST_LOSS_S))
            return
        down_s, jump_s = random.uniform(0.0, LONGEST_DOWN_S), 0.0
        if kind == "clock":
            jump_s = random.uniform(-LARGEST_JUMP_S, LARGEST_JUMP_S)
            self._set_clocks(random)
            if random.random() < HALF:
                self.server.jump(jump_s)
                return
        self.server.crash_in = random.randrange(4)
        self._back_after = (down_s, jump_s)

    def _set_clocks(self, random: Random) -> None:
        """Clocks of some devices jump too, each at a moment and by an amount of its own."""
        for device in self.devices:
            if random.random() < JUMPING_DEVICES:
                at_s = self.timeline.now_s + random.uniform(0.0, LONGEST_DELAY_S)
                jump_s = random.uniform(-LARGEST_JUMP_S, LARGEST_JUMP_S)
                self.timeline.at(at_s, self._set_clock, device, jump_s)

    def _set_clock(self, device: VirtualDevice, jump_s: float) -> None:
        self.faults.note("device clocks")
        device.conditions.jump(jump_s)

    _back_after = (0.0, 0.0)

    def server_crashed(self) -> None:
        """Its process is gone: what was on its way to or from it is lost, and it comes back."""
        down_s, jump_s = self._back_after
        for device in self.devices:
            if device.connected and device.agent is not None:
                device.agent.on_down()
        self.timeline.at(self.timeline.now_s + down_s, self._server_back, jump_s)

    def _server_back(self, jump_s: float) -> None:
        if jump_s:
            self.server.jump(jump_s)
        self.server.start()
        if not self.server.up or self.result is not None:
            return
        for device in self.devices:  # a new session of the coordinator: what it may have missed is said again
            if device.connected and device.agent is not None:
                device.agent.on_up()

    def _lose_broker(self, for_s: float) -> None:
        if not self.broker_up:
            return
        for device in self.devices:
            device.disconnect()
        self.broker_up = False
        if self.server.up:
            self.server.lost_broker()
        self.timeline.at(self.timeline.now_s + for_s, self._broker_back)

    def _broker_back(self) -> None:
        self.broker_up = True
        for device in self.devices:
            device.connect()
