"""One way to know what the machine draws: sensors that are read together, and whether they can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.errors import SensorError
from energy.metering.series import Track
from energy.sensors._files import unexpected
from energy.sensors.base import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from energy.sensors.base import Quality, Sensor

GAP_S, GAP_INTERVALS = 0.5, 3.0
# Real sensors repeat a value often (every second or fourth reading at 20 Hz), never all rails for this long.
FROZEN_S, FROZEN_INTERVALS, FROZEN_READINGS = 60.0, 100.0, 50
STILL_S, STILL_INTERVALS, STILL_READINGS = 5.0, 50.0, 10  # a counter of a machine that runs always grows
ZERO_S, ZERO_INTERVALS = 3.0, 3.0
SAME_READING = 0.01  # of the interval: readings of a sensor with an age that lie closer together are one
ATTEMPTS = 3  # a bus that was busy, or one wrong reading, is no broken sensor

_WORST: tuple[Quality, ...] = ("modelled", "coarse", "power", "counter")


def combined(sources: Sequence[Source]) -> Source:
    """The source of joules that are the sum of several sensors: the worst quality of them counts."""
    if len(sources) == 1:
        return sources[0]
    scopes = {source.scope for source in sources}
    quality = next(quality for quality in _WORST if any(source.quality == quality for source in sources))
    scope = "modelled" if quality == "modelled" else scopes.pop() if len(scopes) == 1 else "package"
    return Source("+".join(s.sensor for s in sources), scope, quality, "; ".join(s.covers for s in sources))


class Part:
    """One sensor of a way with the integrals of its rails.

    Attributes:
        last_s, before_s: times of the last two readings.
        accuracy: what the maker says, as a fraction; 0 if nothing is known.
    """

    def __init__(self, sensor: Sensor) -> None:
        self.sensor = sensor
        self.accuracy: float = getattr(sensor, "accuracy", None) or 0.0
        self.gap_limit_s = max(GAP_S, GAP_INTERVALS * sensor.interval_s)
        self._stuck: tuple[float, ...] = ()  # what it said when it was found frozen
        self.restart()

    def restart(self) -> None:
        """Begins anew, without readings."""
        self._lay_tracks()
        self.last_s: float | None = None
        self.before_s = 0.0
        self._values: tuple[float, ...] = ()
        self._same_since_s = 0.0
        self._same = 0
        self._zero_since_s: float | None = None

    def _lay_tracks(self) -> None:
        self.tracks = [Track(rail, slack_s=max(self.sensor.interval_s, 0.05)) for rail in self.sensor.rails]
        self.totals = [track for track in self.tracks if track.rail.in_total]
        self.counts = all(track.rail.unit == "joules" for track in self.totals)

    @property
    def watts(self) -> float:
        """Total power at the last reading."""
        return sum(track.watts for track in self.totals)

    def read(self, clock: Callable[[], float]) -> str | None:
        """Takes one reading; what was wrong with it in words if a wrong one had to be left out.

        Raises:
            SensorError: it cannot be read, or not be believed.
        """
        note = None
        for attempt in range(ATTEMPTS):
            try:
                note = self._read(clock) or note
            except SensorError as error:
                if error.fault not in ("implausible", "vanished") or attempt == ATTEMPTS - 1:
                    raise
                if error.fault == "implausible":
                    note = f"{self.sensor.source.sensor}: a wrong reading was left out ({error})"
            else:
                break
        return note

    def _read(self, clock: Callable[[], float]) -> str | None:
        at_s, values = self._ask(clock)
        if self.last_s is None:
            self._lay_tracks()  # only its first reading may tell what it measures
        elif at_s <= self.last_s:
            return None
        note = None
        for track, value in zip(self.tracks, values, strict=True):
            try:
                track.check(at_s, value)
            except SensorError as error:
                if track.rail.in_total or track.rail.unit == "watts" or not value >= 0:
                    raise
                track.restart(at_s, value)  # only a count to compare with
                note = str(error)
        self._believe(at_s, values)
        for track, value in zip(self.tracks, values, strict=True):
            track.add(at_s, value)
        self.before_s = at_s if self.last_s is None else self.last_s
        self.last_s = at_s
        return note

    def _ask(self, clock: Callable[[], float]) -> tuple[float, tuple[float, ...]]:
        """What the sensor says, and of which time that is."""
        began_s = clock()
        try:
            values = self.sensor.read()
        except SensorError:
            raise
        except Exception as error:
            raise unexpected(self.sensor, error) from error
        age_s = getattr(self.sensor, "age_s", None)
        if age_s is None:
            return 0.5 * (began_s + clock()), values
        at_s = clock() - age_s
        if self.last_s is not None and at_s - self.last_s < SAME_READING * self.sensor.interval_s:
            return self.last_s, values  # the same reading once more
        return at_s, values

    def _same_for_s(self, at_s: float, values: tuple[float, ...]) -> float:
        """How long these values have been repeated; pauses in which nobody read do not count."""
        if values != self._values:
            self._values, self._same_since_s, self._same = values, at_s, 0
        elif self.last_s is not None and at_s - self.last_s > FROZEN_S:
            self._same_since_s += at_s - self.last_s
        self._same += 1
        return at_s - self._same_since_s

    def _believe(self, at_s: float, values: tuple[float, ...]) -> None:
        source, interval_s = self.sensor.source, self.sensor.interval_s
        if values == self._stuck:
            raise SensorError("frozen", f"{source.sensor} still says exactly the same")
        self._stuck = ()
        same_s = self._same_for_s(at_s, values)
        if source.quality == "power" and not self.counts:
            limit_s, readings = max(FROZEN_S, FROZEN_INTERVALS * interval_s), FROZEN_READINGS
        elif source.quality == "counter" and self.counts:
            limit_s, readings = max(STILL_S, STILL_INTERVALS * interval_s), STILL_READINGS
        else:  # a coarse value stays; what the sensor knows of its age, or how long it may say the same
            limit_s, readings = getattr(self.sensor, "frozen_s", float("inf")), STILL_READINGS
        if self._same > readings and same_s > limit_s:
            self._stuck = values
            raise SensorError("frozen", f"{source.sensor} has said exactly the same for {same_s:.0f} s")
        if self.counts or self.sensor.domain != "system" or source.modelled:
            return
        if any(value for track, value in zip(self.tracks, values, strict=True) if track.rail.in_total):
            self._zero_since_s = None
        elif self._zero_since_s is None:
            self._zero_since_s = at_s
        elif at_s - self._zero_since_s > max(ZERO_S, ZERO_INTERVALS * interval_s):
            raise SensorError("implausible", f"{source.sensor} reads 0 W while this machine runs")


class Way:
    """Sensors that together give the total; see :class:`energy.sensors.base.Sensor`."""

    def __init__(self, sensors: Sequence[Sensor]) -> None:
        self.parts = [Part(sensor) for sensor in sensors]
        self.source = combined([sensor.source for sensor in sensors])
        self.interval_s = min(sensor.interval_s for sensor in sensors)
        self._name_rails()

    def start(self, clock: Callable[[], float]) -> None:
        """Begins anew with a first reading.

        Raises:
            SensorError: as :meth:`read`.
        """
        for part in self.parts:
            part.restart()
        self.read(clock, everything=True)
        self._name_rails()

    def read(self, clock: Callable[[], float], *, everything: bool) -> list[str]:
        """Reads the sensors that have something new to say, or all; gives what was wrong with readings left out.

        Raises:
            SensorError: one of them cannot be read, or not be believed.
        """
        notes = []
        for part in self.parts:
            if everything or part.last_s is None or clock() - part.last_s >= 0.5 * part.sensor.interval_s:
                note = part.read(clock)
                if note is not None:
                    notes.append(note)
        return notes

    def _name_rails(self) -> None:
        rails = [(part.sensor.source.sensor, rail.name) for part in self.parts for rail in part.sensor.rails]
        names = [name for _, name in rails]
        self.names = [name if names.count(name) == 1 else f"{sensor} {name}" for sensor, name in rails]

    @property
    def tracks(self) -> list[Track]:
        """The integrals of all rails, in the order of ``names``."""
        return [track for part in self.parts for track in part.tracks]
