"""A named stretch of time on a meter, and what the meter says about it when it is closed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from energy.metering.marks import Marks
from energy.metering.measurement import Measurement
from energy.metering.span import Span

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from energy.metering.conditions import Conditions
    from energy.metering.meter import Meter
    from energy.metering.way import Way
    from energy.sensors.base import Source


class Window:
    """Made by :meth:`energy.metering.meter.Meter.open`; ends with :meth:`close` or its ``with`` block.

    Attributes:
        name: what it is called.
        started_s, ended_s: on the meter's clock; infinite while it is open.
        idle: whether it is a baseline.
        measurement: after it was closed, None before.
        updates: how often the sensor told something new; after it was closed.
    """

    def __init__(self, meter: Meter, name: str, started_s: float, *, idle: bool, conditions: Conditions | None) -> None:
        self.name = name
        self.started_s = started_s
        self.ended_s = math.inf
        self.idle = idle
        self.measurement: Measurement | None = None
        self.updates = 0.0
        self.marks = Marks(conditions, idle=idle)
        self.span: Span | None = None
        self._meter = meter
        self._past: list[tuple[Source, float]] = []
        self._rails: dict[str, float] = {}
        self._readings = 0
        self._longest_gap_s = 0.0
        self._lost = False
        self._known_s = 0.0  # how long of it a sensor could be read
        self._problems: dict[str, None] = {}

    def joules(self) -> float | None:
        """So far, by the readings up to now; None if unknown. ``meter.source`` says whether they are modelled."""
        if self.measurement is not None:
            return self.measurement.joules
        with self._meter.lock:
            if self.span is None or self._lost:
                return None
            return sum(joules for _, joules in self._past) + self.span.joules(self._meter.clock())

    def at_least(self) -> float | None:
        """Joules that are known so far, also where :meth:`joules` is None since a sensor failed for a while.

        The sum of the stretches that could be read; it grows again as soon as a sensor is back. None if no stretch
        could. As in :meth:`joules` modelled ones are in it; see :attr:`modelled`.
        """
        if self.measurement is not None:
            return self._known()
        with self._meter.lock:
            known = self._known()
            if self.span is None:
                return known
            return (known or 0.0) + self.span.joules(self._meter.clock())

    @property
    def modelled(self) -> bool:
        """Whether any of the joules so far are modelled, so that none may count as measured."""
        return any(source.modelled for source, _ in self._past) or (
            self.span is not None and self.span.way.source.modelled
        )

    def close(self) -> Measurement:
        """Ends the window; a second time gives the same."""
        if self.measurement is None:
            self.measurement = self._meter.finish(self)
        return self.measurement

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What follows is called by the meter, under its lock.

    def note(self, problem: str) -> None:
        """Says once what speaks against the figure."""
        self._problems[problem] = None

    def enter(self, way: Way | None, at_s: float) -> None:
        """From here on joules come from ``way``; None: from nowhere."""
        if way is None:
            self._lost = True
        else:
            self.span = Span(way, at_s, sparse=self.idle)

    def leave(self, at_s: float) -> None:
        """The way in use fails; up to here its last power holds."""
        if self.span is not None:
            self._keep(self.span, at_s)
            self.span = None

    def result(self, end_s: float) -> Measurement:
        """What is known at the end; ``idle_watts`` is left to the meter."""
        span = self.span
        empty = span is not None and not self._past and span.nothing_counted(end_s)
        half_width = None
        if span is not None:
            self.updates = span.updates(end_s)
            if not self._past and not span.way.source.modelled and not empty:
                half_width = span.half_width(end_s)
            self._keep(span, end_s)
            self.span = None
        if empty:
            self.note("the counter did not move: joules are unknown")
        for problem in self.marks.problems():
            self.note(problem)
        seconds = end_s - self.started_s
        joules = None if self._lost or empty or not self._past else sum(joules for _, joules in self._past)
        source = None if joules is None else self._whole_source()
        known = self._known()
        if self._lost and known is not None:
            share = self._known_s / seconds if seconds > 0 else 0.0
            label = " (modelled)" if self.modelled else ""
            self.note(f"{known:.3g} J{label} are known, of {share:.0%} of the time; the rest is unknown")
        return Measurement(
            name=self.name,
            started_s=self.started_s,
            seconds=seconds,
            joules=joules,
            half_width_joules=None if joules is None else half_width,
            idle_watts=None,
            source=source,
            rails={} if joules is None else self._rails,
            samples=self._readings,
            longest_gap_s=self._longest_gap_s,
            problems=tuple(self._problems),
        )

    def _known(self) -> float | None:
        return sum(joules for _, joules in self._past) if self._past else None

    def _keep(self, span: Span, at_s: float) -> None:
        at_s = max(at_s, span.from_s)
        self._past.append((span.way.source, span.joules(at_s)))
        self._known_s += at_s - span.from_s
        for name, joules in span.rails(at_s).items():
            self._rails[name] = self._rails.get(name, 0.0) + joules
        self._readings += span.readings
        self._longest_gap_s = max(self._longest_gap_s, span.longest_gap_s)
        for problem in span.problems(at_s):
            self.note(problem)

    def _whole_source(self) -> Source:
        """The last source, or the modelled one if any part is: a sum with modelled joules in it is modelled."""
        modelled = [source for source, _ in self._past if source.modelled]
        if not modelled:
            return self._past[-1][0]
        measured = sum(joules for source, joules in self._past if not source.modelled)
        if len(modelled) < len(self._past):
            self.note(f"{measured:.3g} J of it were measured; the rest is modelled, so the whole counts as modelled")
        return modelled[-1]
