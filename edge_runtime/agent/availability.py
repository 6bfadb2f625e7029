"""How likely this device can take part at an hour of the week, from its own history.

For every hour of the week an exponentially weighted share of the time in which the device could have trained, and the
weight of what was seen of it; kept in 337 bytes. It could not while a limit forbade it, while there was no connection,
and while it was off. Hours that were seen little lean on the share of all hours. Time and place in the week come in as
arguments, so a clock that jumps adds nothing.
"""

from __future__ import annotations

from edge_runtime.agent.hours import DAY_S, HOUR_S

HOURS = 168
FORGETS = 0.3  # of a fully seen hour, how much of what was seen before
PRIOR_HOURS = 1.0  # of the share of all hours, that every hour's share is mixed with
LONGEST_S = HOUR_S  # a longer stretch between two looks is a jump of the clock, or a device that slept
FOLDED_S = 300.0  # less of an hour is too little to be written down
WEEK_S = 7 * DAY_S
_VERSION = 1
_MOST = 1.0 / FORGETS  # hours that a weight can reach


class Availability:
    """The table; give it :meth:`seen` every so often.

    Args:
        data: what :meth:`pack` gave; empty, or of another version: nothing was seen yet.
    """

    def __init__(self, data: bytes = b"") -> None:
        known = len(data) == 1 + 2 * HOURS and data[0] == _VERSION
        self._shares = bytearray(data[1 : 1 + HOURS] if known else HOURS)  # 255: all of the time
        self._weights = bytearray(data[1 + HOURS :] if known else HOURS)  # 255: the most that can be
        self._weight = sum(self._weights)  # of all hours, in 255ths; and of that, times the shares, in 255ths of those
        self._could = sum(weight * share for weight, share in zip(self._weights, self._shares, strict=True))
        self._hour = -1
        self._seen_s = self._could_s = 0.0  # within that hour
        self._last: tuple[float, float, bool] | None = None

    def seen(self, clock_unix_s: float, week_second: float | None, could: bool) -> None:
        """The device can train now, or cannot; what lies between this and the last time counts as it was then.

        Args:
            clock_unix_s: the device's clock.
            week_second: local, from Monday's midnight; None: the clock was never set.
            could: whether a job would come, and be taken, now.
        """
        last, self._last = self._last, None if week_second is None else (clock_unix_s, week_second, could)
        if last is None:
            return
        passed_s = clock_unix_s - last[0]
        if not 0.0 < passed_s <= LONGEST_S:
            return
        self._add(last[1], passed_s, could=last[2])

    def was_off(self, week_second: float, off_s: float) -> None:
        """The device was off, so it could not train; of a longer time the last week counts.

        Args:
            week_second: when it was on again; local, from Monday's midnight.
            off_s: for how long it had been off.
        """
        left_s = min(off_s, WEEK_S)
        while left_s > 1e-3:
            at_s = (week_second - left_s) % WEEK_S
            part_s = min(left_s, HOUR_S - at_s % HOUR_S)
            self._add(at_s, part_s, could=False)
            left_s -= part_s

    def predict(self, week_second: float, horizon_s: float = HOUR_S) -> float | None:
        """The share of the time from now on in which the device will probably be able to train, 0 to 1.

        Args:
            week_second: now; local, from Monday's midnight.
            horizon_s: how far to look.

        Returns:
            None: nothing was seen yet.
        """
        weight, could = self._overall()
        if weight <= 0.0:
            return None
        overall, at_s, left_s, share = could / weight, week_second, horizon_s, 0.0
        while left_s > 1e-6:
            part_s = min(left_s, HOUR_S - at_s % HOUR_S)
            share += part_s * self._share(int(at_s // HOUR_S) % HOURS, overall)
            at_s, left_s = at_s + part_s, left_s - part_s
        return share / horizon_s

    def pack(self) -> bytes:
        """Everything but what was seen of the current hour, while that is less than some minutes."""
        if self._seen_s >= FOLDED_S:
            self._fold()
        return bytes((_VERSION, *self._shares, *self._weights))

    def _add(self, week_second: float, seconds: float, *, could: bool) -> None:
        hour = int(week_second // HOUR_S) % HOURS
        if hour != self._hour:
            self._fold()
            self._hour = hour
        self._seen_s += seconds
        self._could_s += seconds if could else 0.0

    def _share(self, hour: int, overall: float) -> float:
        weight, could = self._mixed(hour)
        return (could + PRIOR_HOURS * overall) / (weight + PRIOR_HOURS)

    def _mixed(self, hour: int) -> tuple[float, float]:
        """Weight in hours, and how much of it the device could have trained."""
        weight = self._weights[hour] / 255.0 * _MOST
        could = weight * self._shares[hour] / 255.0
        if hour != self._hour or self._seen_s <= 0.0:
            return weight, could
        part = min(1.0, self._seen_s / HOUR_S)
        kept = 1.0 - FORGETS * part
        return kept * weight + part, kept * could + part * self._could_s / self._seen_s

    def _overall(self) -> tuple[float, float]:
        """As the sum of :meth:`_mixed` over all hours; whole numbers are kept, so nothing is lost as hours go by."""
        weight, could = self._weight, self._could
        if self._hour < 0 or self._seen_s <= 0.0:
            return weight / 255.0 * _MOST, could / 65025.0 * _MOST
        of_hour = self._weights[self._hour]
        mixed_weight, mixed_could = self._mixed(self._hour)
        weight, could = weight - of_hour, could - of_hour * self._shares[self._hour]
        return weight / 255.0 * _MOST + mixed_weight, could / 65025.0 * _MOST + mixed_could

    def _fold(self) -> None:
        if self._hour >= 0 and self._seen_s > 0.0:
            hour, weights, shares = self._hour, self._weights, self._shares
            weight, could = self._mixed(hour)
            before, before_could = weights[hour], weights[hour] * shares[hour]
            weights[hour] = max(1, min(255, round(255.0 * weight / _MOST)))
            shares[hour] = max(0, min(255, round(255.0 * could / weight)))
            self._weight += weights[hour] - before
            self._could += weights[hour] * shares[hour] - before_could
        self._seen_s = self._could_s = 0.0
