"""What one burst of steps cost: by the clocks of the process, and by a sensor of power or energy where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.errors import ProfileError
from energy.thor.probing import Reading, cpu_cost
from energy.thor.profile import Mark, Sample

if TYPE_CHECKING:
    from energy.metering.measurement import Measurement
    from energy.metering.meter import Meter
    from energy.sensors.base import Source
    from energy.thor.probing import Stepper
    from energy.thor.profile import Quantity

CPU_WINDOW_S = 0.025
METER_WINDOW_S = 2.0
METER_UPDATES = 20
_MOST_SAMPLES = 4000
_LOST = 5  # windows in a row without a figure


class CpuGauge:
    """CPU time and wall time, where no sensor can be read."""

    window_s = CPU_WINDOW_S
    quantity: Quantity = "cpu_seconds"

    def __call__(self, stepper: Stepper) -> Reading:
        """One burst."""
        return cpu_cost(stepper)


class MeterGauge:
    """Joules by a meter that is being sampled, beside CPU time and wall time.

    Bursts last as long as the sensor needs. All joules are of the source that the meter has at the start: a window of
    another one, or one that the meter marks as doubtful, gives no joules, and after five of them in a row the cause is
    raised. Joules of a modelled source are ``modelled_joules``.

    Attributes:
        power, marks: what was seen, for pictures; times in seconds from the first burst.
    """

    def __init__(self, meter: Meter) -> None:
        if meter.source is None:
            raise ProfileError("no sensor of power or energy can be read; profile by CPU time with --sensor none")
        self._meter = meter
        self._source = meter.source
        self._began_s = meter.clock()
        self._lost = 0
        self.quantity: Quantity = "modelled_joules" if meter.source.modelled else "joules"
        self.window_s = max(METER_WINDOW_S, METER_UPDATES * meter.interval_s)
        self.power: list[Sample] = []
        self.marks: list[Mark] = []
        self.problems: dict[str, None] = {}

    def __call__(self, stepper: Stepper) -> Reading:
        """One burst in a window of its own.

        Raises:
            ProfileError: five bursts in a row gave no joules, or only those of another sensor.
        """
        window = self._meter.open("burst")
        try:
            reading = cpu_cost(stepper)
        finally:
            measured = window.close()
        self._remember(measured)
        same = measured.source == self._source
        if measured.valid and measured.joules is not None and same:
            self._lost = 0
            return Reading(reading.steps, {**reading.costs, self.quantity: measured.joules / reading.steps})
        self._lost += 1
        if self._lost >= _LOST:
            if measured.source is not None and not same:
                raise ProfileError(self._changed(measured.source))
            cause = "; ".join(measured.problems) or "the sensor gives no figure"
            raise ProfileError(
                f"{_LOST} windows in a row are invalid: {cause}; let the device cool down, or fix its clocks"
            )
        return reading

    def idle(self, seconds: float) -> float | None:
        """Mean watts over an idle stretch; None if the sensor gives no figure, or another one took over."""
        import time

        with self._meter.open("idle", idle=True) as window:
            time.sleep(seconds)
        measured = window.close()
        self._remember(measured)
        if measured.joules is None or measured.source != self._source:
            return None
        return measured.joules / measured.seconds

    def mark(self, name: str, started_s: float) -> None:
        """Names what was measured since ``started_s`` on the meter's clock."""
        self.marks.append(Mark(name, started_s - self._began_s, self._meter.clock() - self._began_s))

    def _changed(self, now: Source) -> str:
        first = self._source
        return (
            f"{first.label} failed, and {_LOST} bursts in a row were measured by {now.label}: joules of two sensors "
            f"make no profile; see to {first.sensor} and profile again, or begin anew with --sensor {now.sensor}"
        )

    def _remember(self, measured: Measurement) -> None:
        self.problems.update(dict.fromkeys(measured.problems))
        if measured.source is not None and measured.source != self._source:
            self.problems[f"{measured.source.label} took over from {self._source.label}: its joules are left out"] = (
                None
            )
            return
        if measured.joules is not None and measured.seconds > 0 and len(self.power) < _MOST_SAMPLES:
            middle = measured.started_s + measured.seconds / 2 - self._began_s
            self.power.append(Sample(middle, measured.joules / measured.seconds))
