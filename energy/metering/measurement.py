"""What a meter says about one window of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from energy.sensors.base import Source


class Measurement(NamedTuple):
    """Energy of one named window.

    Attributes:
        name: of the window.
        started_s, seconds: on the meter's monotonic clock.
        joules: gross, of the whole scope of ``source``; None if nothing could be measured, never a silent zero.
        half_width_joules: half of the 95 % interval of ``joules``; None if the sensor does not tell.
        idle_watts: mean power of the idle stretches before and after; None if there were none.
        source: which sensor it comes from, the last one if it changed within the window; None with ``joules``.
        rails: gross joules of every rail that could be integrated; parts of a total among them.
        samples: readings inside the window.
        longest_gap_s: the longest time without a reading.
        problems: in words, what makes the figure doubtful: throttling, a change of clocks, gaps, a sensor that failed.
    """

    name: str
    started_s: float
    seconds: float
    joules: float | None
    half_width_joules: float | None
    idle_watts: float | None
    source: Source | None
    rails: dict[str, float]
    samples: int
    longest_gap_s: float
    problems: tuple[str, ...] = ()

    @property
    def net_joules(self) -> float | None:
        """Joules above idle; None without a figure or without an idle baseline."""
        if self.joules is None or self.idle_watts is None:
            return None
        return self.joules - self.idle_watts * self.seconds

    @property
    def valid(self) -> bool:
        """Whether there is a figure and nothing speaks against it."""
        return self.joules is not None and not self.problems
