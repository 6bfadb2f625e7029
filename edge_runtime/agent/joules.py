"""What this device draws, and what each of its jobs drew: the agent's side of :mod:`energy.meter`.

The meter is sampled while a job runs, as often as its sensor has something new to say; between jobs once per tick, for
the idle baseline; and never where there is no sensor. What cannot be known is None.
"""

from __future__ import annotations

import logging
import resource
import time
from typing import TYPE_CHECKING

from edge_runtime.messages import EnergySource, EnergyUse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge_runtime.agent.energy_config import EnergyConfig
    from edge_runtime.agent.pipe import Phase
    from edge_runtime.messages import Job
    from edge_runtime.transport.loop import Loop, Timer
    from energy.measurement import Measurement
    from energy.meter import Meter
    from energy.window import Window

log = logging.getLogger("edge.energy")

FASTEST_S = 0.1  # between samples while a job runs
SHARE = 1 / 50  # of the time that reading a slow sensor may take: some are a process each time
IDLE_STRETCH_S = 60.0  # a baseline is of the last minutes; between two of them a sensor that failed is tried again
COARSE_DELAYS_S = (2.0, 4.0)  # after a tick: a plug that was not read for 3 s makes its next reading wait for an answer
LATE_S, LATE = 0.02, 0.2  # how much longer (and shorter) than the worker's own time a window may be


class Joules:
    """Measures jobs. One job at a time; not for several threads.

    Args:
        loop: its clock and timers.
        job_joules: the device's limit for one job.
        on_limit: the running job has drawn what it may; called once with the reason.
        on_source: joules come from another source now, or from none.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        job_joules: float | None,
        on_limit: Callable[[str], None],
        on_source: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._job_joules = job_joules
        self._on_limit, self._on_source = on_limit, on_source
        self._meter: Meter | None = None
        self._idle: Window | None = None
        self._job: Window | None = None
        self._phases: dict[Phase, Window] = {}
        self._limit: tuple[float, str] | None = None
        self._timer: Timer | None = None

    @property
    def source(self) -> EnergySource | None:
        """Where joules come from now; None: they are not known."""
        source = None if self._meter is None else self._meter.source
        if source is None:
            return None
        return EnergySource(sensor=source.sensor, scope=source.scope, quality=source.quality, covers=source.covers)

    def start(self, config: EnergyConfig, *, busy_s: Callable[[], float] | None, root: Path) -> None:
        """Looks for sensors and begins to measure; see :func:`edge_runtime.agent.sensing.survey`."""
        if config.sensor == "none":
            return
        from edge_runtime.agent.sensing import survey

        ways, refused = survey(config, busy_s=busy_s, root=root)
        for refusal in refused:
            if refusal.fault != "absent" or refusal.sensor in (config.sensor, "plug"):
                log.warning("energy: %s", refusal.reason)
        if not ways:
            log.info("energy: there is no sensor here, and no watts for a modelled one in agent.toml: joules unknown")
            return
        from energy.meter import Meter

        self._meter = Meter(ways, clock=self._loop.now, on_change=self._changed)
        source = self._meter.source
        if source is not None:
            log.info("energy: from %s (%s): %s", source.sensor, source.scope, source.covers)
        self.tick()

    def tick(self) -> None:
        """Some seconds have passed: samples the idle baseline."""
        if self._meter is None or self._job is not None:
            return
        if self._idle is not None and self._loop.now() - self._idle.started_s < IDLE_STRETCH_S:
            self._meter.sample()
        else:
            self._end_idle()
            self._meter.sample()
            self._idle = self._meter.open("idle", idle=True)
        if self._meter.source is not None and self._meter.source.quality == "coarse":
            for delay_s in COARSE_DELAYS_S:
                self._loop.call_later(delay_s, self._sample_idle)

    def _sample_idle(self) -> None:
        if self._meter is not None and self._idle is not None:
            self._meter.sample()

    def job_begins(self, job: Job) -> None:
        """From here on what is drawn counts for this job."""
        self._limit = self._limit_of(job)
        if self._meter is None or self._meter.source is None:
            if self._limit is not None:
                log.warning(
                    "job %s/%s may draw %g J (%s), but nothing here can measure it: it runs without that limit",
                    *(job.run, job.assignment, *self._limit),
                )
            if self._meter is None:
                return
        self._end_idle()
        self._job = self._meter.open(job.assignment)
        self._timer = self._loop.call_later(max(self._meter.interval_s, FASTEST_S), self._sample)

    def phase_begins(self, phase: Phase) -> None:
        """The worker begins to train, or to compress what it trained."""
        if self._meter is None or self._job is None or phase in self._phases:
            return
        for window in self._phases.values():
            window.close()
        self._phases[phase] = self._meter.open(phase)

    def job_ends(
        self, radio_joules: float | None, *, train_s: float = 0.0, compress_s: float = 0.0
    ) -> EnergyUse | None:
        """What the job drew; None if nothing of it is known.

        Args:
            radio_joules: modelled, of its transfers.
            train_s: wall time of this phase by the worker's clock; 0: unknown. A window that the agent opened or
                closed too late to fit it says nothing.
            compress_s: the same of the other phase.
        """
        train = self._figure("train", train_s)
        compress = self._figure("compress", compress_s)
        if self._timer is not None:
            self._timer.cancel()
        if self._job is not None:
            self._job.close()
        self._job, self._timer, self._limit = None, None, None
        self._phases.clear()
        self.tick()
        known = [figure for figure in (train, compress) if figure is not None]
        if not known and radio_joules is None:
            return None
        idle = next((figure.idle_watts for figure in known if figure.idle_watts is not None), None)
        return EnergyUse(
            train_mj=None if train is None else _milli(train.joules),
            compress_mj=None if compress is None else _milli(compress.joules),
            radio_mj=_milli(radio_joules),
            idle_mw=_milli(idle),
            modelled=any(figure.source is not None and figure.source.modelled for figure in known),
        )

    def close(self) -> None:
        """Closes the sensors."""
        if self._timer is not None:
            self._timer.cancel()
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _figure(self, phase: Phase, worker_s: float) -> Measurement | None:
        window = self._phases.get(phase)
        if window is None:
            return None
        found = window.close()
        for problem in found.problems:
            log.info("joules of %s: %s", phase, problem)
        return found if _says_something(found, worker_s) else None

    def _sample(self) -> None:
        meter = self._meter
        if meter is None or self._job is None:
            return
        began_s = self._loop.now()
        meter.sample()
        took_s = self._loop.now() - began_s
        self._timer = self._loop.call_later(max(meter.interval_s, FASTEST_S, took_s / SHARE), self._sample)
        drawn = self._job.joules()
        if self._limit is not None and drawn is not None and drawn >= self._limit[0]:
            limit, name = self._limit
            self._limit = None
            how = "modelled" if meter.source is not None and meter.source.modelled else "measured"
            self._on_limit(f"the job drew {drawn:.3g} J ({how}), and {name} = {limit:g}")

    def _limit_of(self, job: Job) -> tuple[float, str] | None:
        limits = [(self._job_joules, "limits.job_joules"), (job.joule_limit, "job_joules of its plan")]
        return min(((value, name) for value, name in limits if value is not None), default=None)

    def _end_idle(self) -> None:
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def _changed(self, text: str) -> None:
        log.warning("energy: %s", text)
        self._loop.call_soon(self._on_source)


def _milli(value: float | None) -> int | None:
    return None if value is None else max(0, round(1000 * value))


def _says_something(found: Measurement, worker_s: float) -> bool:
    """Whether a figure is more than noise, and of the time that the worker means."""
    if found.joules is None or found.source is None:
        return False
    if found.half_width_joules is not None and found.half_width_joules >= found.joules > 0:
        return False
    return worker_s <= 0 or (1 - LATE) * worker_s <= found.seconds <= (1 + LATE) * worker_s + LATE_S


class OwnCpu:
    """CPU seconds of this process and its worker: :meth:`read` never falls, also when a worker ends.

    Args:
        worker: process id of the worker that runs now, if one does.
    """

    def __init__(self, worker: Callable[[], int | None]) -> None:
        self._worker = worker
        self._most_s = 0.0

    def read(self) -> float:
        """Seconds since this process began; what a worker used counts while it runs and after it was reaped."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        used_s = time.process_time() + children.ru_utime + children.ru_stime + self._of_worker()
        self._most_s = max(self._most_s, used_s)
        return self._most_s

    def _of_worker(self) -> float:
        pid = self._worker()
        if pid is None:
            return 0.0
        try:
            return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): nanoseconds, where /proc has 10 ms
        except (OSError, OverflowError):  # it ended
            return 0.0


def described(use: EnergyUse) -> str:
    """What a job drew, for the log."""
    how = "modelled" if use.modelled else "measured"
    parts = [
        (use.train_mj, f"training, {how}"),
        (use.compress_mj, f"compression, {how}"),
        (use.radio_mj, "radio, modelled"),
    ]
    return ", ".join(f"{1e-3 * value:.3g} J ({name})" for value, name in parts if value is not None)
