"""What one way of measuring says about one window, or about the part of it that it was in use for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from energy.metering.series import Track
    from energy.metering.way import Part, Way

NORMAL_95 = 1.96
MOST_REPEATS = 3.0  # 23 to 57 % of the readings of an INA3221 at 20 Hz repeat the one before
COUNTER_TOLERANCE = 0.05  # power readings and a counter of the same sensor may differ by this and two counts


class _Slice:
    """One rail within a span: what its track had at the start."""

    __slots__ = ("changes", "from_s", "squares", "start", "track")

    def __init__(self, track: Track, from_s: float) -> None:
        self.track = track
        self.from_s = from_s
        self.start: float | None = None  # known when the first reading after the edge has come
        self.squares = track.squares
        self.changes = track.changes

    def joules(self, until_s: float) -> float:
        start = self.track.at(self.from_s) if self.start is None else self.start
        return self.track.at(until_s) - start


class _Share:
    """One sensor within a span."""

    def __init__(self, part: Part, from_s: float) -> None:
        self.part = part
        self.slices = [_Slice(track, from_s) for track in part.tracks]
        self.totals = [piece for piece in self.slices if piece.track.rail.in_total]
        self.readings = 0
        self.seen_s = part.last_s
        self.lowest = self.highest = part.watts


class Span:
    """A stretch of a window over one way.

    Attributes:
        readings: within the stretch, of the sensor that was read most often.
        gaps, longest_gap_s: times without a reading that a power sensor (or a counter that wraps) does not forgive.

    ``sparse``: readings of power may lie far apart, since only their mean is wanted.
    """

    def __init__(self, way: Way, from_s: float, *, sparse: bool = False) -> None:
        self.way = way
        self._sparse = sparse
        self.from_s = from_s
        self.gaps = 0
        self.longest_gap_s = 0.0
        self._shares = [_Share(part, from_s) for part in way.parts]

    @property
    def readings(self) -> int:
        return max(share.readings for share in self._shares)

    def update(self, until_s: float = math.inf) -> None:
        """Takes note of new readings; those later than ``until_s`` only serve to find the edge."""
        for share in self._shares:
            part = share.part
            last_s = part.last_s
            if last_s is None or last_s == share.seen_s or last_s <= self.from_s:
                continue
            share.seen_s = last_s
            for piece in share.slices:
                if piece.start is None:
                    piece.start = piece.track.at(self.from_s)
            share.readings += last_s <= until_s
            watts = part.watts
            share.lowest, share.highest = min(share.lowest, watts), max(share.highest, watts)
            gap_s = min(last_s, until_s) - max(part.before_s, self.from_s)
            self.longest_gap_s = max(self.longest_gap_s, gap_s)
            forgiven = not _may_have_wrapped(share, gap_s) if part.counts else self._sparse
            if gap_s > part.gap_limit_s and not forgiven:
                self.gaps += 1

    def updates(self, until_s: float) -> float:
        """How often its sensors told something new; of several the one that did so least often."""
        return min(_updates(share, until_s - self.from_s, until_s) for share in self._shares)

    def joules(self, until_s: float) -> float:
        """Of the total."""
        return sum(piece.joules(until_s) for share in self._shares for piece in share.totals)

    def rails(self, until_s: float) -> dict[str, float]:
        """Of every rail."""
        pieces = [piece for share in self._shares for piece in share.slices]
        return {name: piece.joules(until_s) for name, piece in zip(self.way.names, pieces, strict=True)}

    def half_width(self, until_s: float) -> float:
        """Half of the 95 % interval of :meth:`joules`.

        Noise of power readings comes from the mean square of successive differences (von Neumann 1941); where sensors
        repeat values that they did not measure anew, there are fewer readings than there seem to be, at most by
        ``MOST_REPEATS``. Added are the resolution, what may have happened between an edge and the readings beside it,
        and the accuracy where the sensor states one.
        """
        variance = 0.0
        seconds = until_s - self.from_s
        for share in self._shares:
            joules = sum(piece.joules(until_s) for piece in share.totals)
            variance += (share.part.accuracy * joules / NORMAL_95) ** 2
            if share.part.counts:
                variance += sum(2 * _count(piece, share, until_s) ** 2 / 12 for piece in share.totals)
                continue
            for piece in share.totals:
                changes = piece.track.changes - piece.changes
                if changes:
                    readings = max(share.readings, 1)
                    repeats = min(max(readings / changes, 1.0), MOST_REPEATS)
                    noise = (piece.track.squares - piece.squares) / (2 * readings)  # variance of one reading, or less
                    variance += noise / readings * (seconds * repeats) ** 2
                variance += (seconds * piece.track.resolution) ** 2 / 12
            edge_s = min(max(share.part.sensor.interval_s, seconds / (share.readings + 1)), seconds)
            variance += 2 * ((share.highest - share.lowest) * edge_s) ** 2 / 12
        return NORMAL_95 * math.sqrt(variance)

    def problems(self, until_s: float) -> list[str]:
        """What speaks against the figure, in words."""
        found = []
        if self.gaps:
            times = "a gap" if self.gaps == 1 else f"{self.gaps} gaps"
            found.append(f"{times} without a reading, up to {self.longest_gap_s:.2f} s")
        seconds = until_s - self.from_s
        for share in self._shares:
            sensor = share.part.sensor
            if sensor.source.modelled:
                continue
            update_s = sensor.interval_s
            if share.part.counts:
                update_s = min(_update_s(piece, share, until_s) for piece in share.totals)
            if seconds < 2 * update_s:
                found.append(
                    f"{seconds:.3f} s are too short for {sensor.source.sensor}, which tells something new every "
                    f"{update_s:.3g} s"
                )
            found += [text for piece in share.slices if (text := _disagrees(piece, share, until_s))]
        return found

    def nothing_counted(self, until_s: float) -> bool:
        """Whether a counter did not move at all, so that its 0 J mean nothing."""
        return any(
            share.part.counts
            and not share.part.sensor.source.modelled
            and sum(piece.joules(until_s) for piece in share.totals) <= 0
            for share in self._shares
        )


def _updates(share: _Share, seconds: float, until_s: float) -> float:
    part = share.part
    if not part.counts:  # one more than inside: those at the edges are taken at once
        return min(share.readings + 1.0, seconds / part.sensor.interval_s)
    if part.sensor.source.quality == "coarse":
        return min(piece.track.changes - piece.changes for piece in share.totals)
    return seconds / max(_update_s(piece, share, until_s) for piece in share.totals)


def _may_have_wrapped(share: _Share, gap_s: float) -> bool:
    return any(
        piece.track.rail.wraps_at is not None and piece.track.watts * gap_s > 0.5 * piece.track.rail.wraps_at
        for piece in share.totals
    )


def _update_s(piece: _Slice, share: _Share, until_s: float) -> float:
    """How often a counter moves: as its sensor says, or faster where smaller counts were seen."""
    interval_s = share.part.sensor.interval_s
    joules, seconds = piece.joules(until_s), until_s - piece.from_s
    if piece.track.step <= 0 or joules <= 0 or seconds <= 0:
        return interval_s
    return min(interval_s, piece.track.step * seconds / joules)


def _count(piece: _Slice, share: _Share, until_s: float) -> float:
    """Joules by which a counter may be late at an edge."""
    seconds = until_s - piece.from_s
    return _update_s(piece, share, until_s) * piece.joules(until_s) / seconds if seconds > 0 else 0.0


def _disagrees(piece: _Slice, share: _Share, until_s: float) -> str | None:
    """A rail ``NAME counter`` outside the total is the sensor's own, coarser count of ``NAME``."""
    rail = piece.track.rail
    changes = piece.track.changes - piece.changes
    if rail.unit != "joules" or rail.in_total or changes < 3 or not rail.name.endswith(" counter"):
        return None
    for other in share.totals:
        name = other.track.rail.name
        if name == rail.name.removesuffix(" counter"):
            counted, summed = piece.joules(until_s), other.joules(until_s)
            if abs(counted - summed) > 2 * counted / changes + COUNTER_TOLERANCE * summed:
                return f"the counter of {name} says {counted:.0f} J, its power {summed:.0f} J"
    return None
