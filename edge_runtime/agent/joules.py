"""What this device draws, and what each of its jobs drew: the agent's side of :mod:`energy.metering.meter`.

The meter is sampled while a job runs, as often as its sensor has something new to say; between jobs once per tick, for
the idle power; and never where there is no sensor. What cannot be known is None.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.agent.idle import IdlePower
from edge_runtime.agent.job_energy import UNTOLD, Idle, energy_use, problems
from edge_runtime.errors import EdgeError
from edge_runtime.messages import EnergySource, EnergyUse

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.agent.energy_config import EnergyConfig
    from edge_runtime.agent.job_energy import Worked
    from edge_runtime.agent.pipe import Phase
    from edge_runtime.agent.sensing import Survey
    from edge_runtime.messages import Job
    from edge_runtime.transport.loop import Loop, Timer
    from energy.metering.measurement import Measurement
    from energy.metering.meter import Meter
    from energy.metering.window import Window

log = logging.getLogger("edge.energy")

FASTEST_S = 0.1  # between samples while a job runs
SHARE = 1 / 50  # of the time that reading a slow sensor may take
SURVEY_DELAYS_S = (60.0, 300.0, 900.0, 3600.0)  # between looks for sensors while none is known that measures


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
        self._config: EnergyConfig | None = None
        self._busy_s: Callable[[], float] | None = None
        self._root = Path("/")
        self._measuring: frozenset[str] = frozenset()  # sensors that the meter may take
        self._surveys = 0
        self._next_survey_s = 0.0
        self._core_watts: float | None = None
        self._idle = IdlePower(loop)
        self._job: Window | None = None
        self._job_name = ""
        self._job_idle: Idle | None = None
        self._switched = False  # the source changed within this job
        self._phases: dict[Phase, Window] = {}
        self._limit: tuple[float, str] | None = None
        self._limit_told = False
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
        self._config, self._busy_s, self._root = config, busy_s, root
        self._next_survey_s = self._loop.now() + SURVEY_DELAYS_S[0]
        found = self._survey(config, background=True)
        for refusal in found.refused:
            if refusal.fault != "absent" or refusal.sensor in (config.sensor, "plug"):
                log.warning("energy: %s", refusal.reason)
        if not found.ways:
            log.info("energy: there is no sensor here, and no watts for a modelled one in agent.toml: joules unknown")
            return
        self._measure(found)
        self.tick()

    def tick(self) -> None:
        """Some seconds have passed: looks for sensors if it has to, and begins to measure the idle power if it may."""
        if self._job is not None or self._idle.measures:
            return
        self._look_again()
        if self._meter is not None:
            self._meter.sample()  # no window is open: a better sensor that failed may take over again
            self._idle.begin(self._meter)

    def job_begins(self, job: Job, day_joules: float | None = None) -> None:
        """From here on what is drawn counts for this job; ``day_joules``: left of the device's limit for this day."""
        self._limit, self._limit_told = self._limit_of(job, day_joules), False
        self._job_name, self._switched = f"{job.run}/{job.assignment}", False
        if self._meter is None or self._meter.source is None:
            if self._limit is not None:
                self._limit_told = True
                log.warning(
                    "job %s may draw %g J (%s), but nothing here can measure it: it runs without that limit",
                    *(self._job_name, *self._limit),
                )
            if self._meter is None:
                return
        self._idle.end()
        self._job_idle = self._idle.now()
        self._job = self._meter.open(job.assignment)
        self._timer = self._loop.call_later(max(self._meter.interval_s, FASTEST_S), self._sample)

    def phase_begins(self, phase: Phase) -> None:
        """The worker begins to train, or to compress what it trained."""
        if self._meter is None or self._job is None or phase in self._phases:
            return
        for window in self._phases.values():
            window.close()
        self._phases[phase] = self._meter.open(phase)

    def job_ends(self, radio_joules: float | None, worked: Worked = UNTOLD) -> EnergyUse | None:
        """What the job drew; None if nothing of it is known.

        ``idle_mw`` is of the last good stretch before the job, since an update cannot wait for the one after it.

        Args:
            radio_joules: modelled, of its transfers.
            worked: what the worker says of its phases.
        """
        phases = {name: window.close() for name, window in self._phases.items()}
        job = None if self._job is None else self._job.close()
        if self._timer is not None:
            self._timer.cancel()
        self._job, self._timer, self._limit = None, None, None
        self._phases.clear()
        own = self._core_watts if self._is_own(job) else None
        use = energy_use(job, phases, worked, radio_joules=radio_joules, core_watts=own, idle=self._job_idle)
        against = problems(job, phases)
        if against:
            known = use is not None and use.doubtful
            log.info(
                "joules of job %s are %s: %s", self._job_name, "doubtful" if known else "unknown", "; ".join(against)
            )
        return use

    def close(self) -> None:
        """Closes the sensors."""
        if self._timer is not None:
            self._timer.cancel()
        self._idle.end()
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _measure(self, found: Survey) -> None:
        from energy.metering.conditions import read_conditions
        from energy.metering.meter import Meter

        root = self._root
        if self._meter is not None:
            self._idle.end()
            self._meter.close()
        self._core_watts, self._measuring = found.core_watts, found.measuring
        self._meter = Meter(
            found.ways,
            clock=self._loop.now,
            conditions=lambda: read_conditions(root),
            on_change=self._changed,
        )
        source = self._meter.source
        if source is not None:
            log.info("energy: from %s (%s): %s", source.sensor, source.scope, source.covers)

    def _survey(self, config: EnergyConfig, *, background: bool) -> Survey:
        from edge_runtime.agent.sensing import survey

        return survey(config, busy_s=self._busy_s, root=self._root, background=background)

    def _look_again(self) -> None:
        """While nothing measures: a permission may have been given, a driver loaded, a charger unplugged.

        Sensors that were found before, and the plug, are tried again by the meter.
        """
        config, source = self._config, self.source
        if config is None or config.sensor in ("modelled", "plug") or self._loop.now() < self._next_survey_s:
            return
        if source is not None and source.quality != "modelled":
            self._surveys = 0
            return
        self._surveys = min(self._surveys + 1, len(SURVEY_DELAYS_S) - 1)
        self._next_survey_s = self._loop.now() + SURVEY_DELAYS_S[self._surveys]
        try:
            found = self._survey(msgspec.structs.replace(config, plug=None), background=False)
            found.close()
            if found.measuring <= self._measuring:
                return
            self._measure(self._survey(config, background=True))
        except EdgeError as error:  # a calibration that cannot be read any more, say
            log.warning("energy: %s", error)
            return
        self._on_source()

    def _sample(self) -> None:
        meter = self._meter
        if meter is None or self._job is None:
            return
        began_s = self._loop.now()
        meter.sample()
        took_s = self._loop.now() - began_s
        self._timer = self._loop.call_later(max(meter.interval_s, FASTEST_S, took_s / SHARE), self._sample)
        if self._limit is not None:
            self._watch_limit(self._job, *self._limit, gone=meter.source is None)

    def _watch_limit(self, job: Window, limit: float, name: str, *, gone: bool) -> None:
        """Joules that are known count, also those from before a sensor failed and after it came back."""
        drawn = job.at_least()
        if drawn is not None and drawn >= limit:
            self._limit = None
            how = "modelled" if job.modelled else "measured"
            if self._phases:
                self._on_limit(f"the job drew {drawn:.3g} J ({how}), and {name} = {limit:g}")
            else:
                self._on_limit(
                    f"the job drew {drawn:.3g} J ({how}) before its first step (starting and loading); "
                    f"{_limit_words(name, limit)}; raise it"
                )
        elif gone and not self._limit_told:
            self._limit_told = True
            log.warning(
                "job %s: nothing can be measured any more, so its limit %s = %g does not hold until a sensor is back; "
                "known until now: %s",
                *(self._job_name, name, limit, "nothing" if drawn is None else f"{drawn:.3g} J"),
            )

    def _limit_of(self, job: Job, day_joules: float | None) -> tuple[float, str] | None:
        limits = [
            (self._job_joules, "limits.job_joules"),
            (job.joule_limit, "job_joules of its plan"),
            (day_joules, "joules left of limits.joules_per_day"),
        ]
        return min(((value, name) for value, name in limits if value is not None), default=None)

    def _is_own(self, job: Measurement | None) -> bool:
        """Whether a job was modelled by the agent's own CPU time from its start to its end."""
        return job is not None and job.source is not None and job.source.modelled and not self._switched

    def _changed(self, text: str) -> None:
        log.warning("energy: %s", text)
        self._switched = True
        self._loop.call_soon(self._on_source)


def _limit_words(name: str, limit: float) -> str:
    key, _, of = name.partition(" ")
    return f"{key} = {limit:g} {of}".rstrip()
