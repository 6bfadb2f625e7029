"""The device's local time, as the owner's limits count it: hours of the day, days, months; and spans of hours.

Pure but for the system's time zone. A clock that was never set (a board without a battery for it) has no local time.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

EARLIEST_CLOCK_UNIX_S = 1_767_225_600.0  # 2026-01-01: a clock before this was never set
LATEST_CLOCK_UNIX_S = 32_503_680_000.0  # the year 3000: nor can this be
DAY_S, HOUR_S = 86_400.0, 3600.0
_SPAN = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)\s*-\s*([01]?\d|2[0-4]):([0-5]\d)")


class LocalTime(NamedTuple):
    """``day`` and ``month`` are numbers that grow. ``day_second`` counts from local midnight, ``week_second`` from that
    of Monday. ``*_left_s``: until the next day or month begins.
    """

    day: int
    month: int
    day_second: float
    week_second: float
    day_left_s: float
    month_left_s: float


class Span(NamedTuple):
    """Seconds of the local day; one that ends before it begins lasts over midnight."""

    begin_s: float
    end_s: float

    def left_s(self, second: float) -> float:
        """Seconds until it ends; 0 outside of it."""
        length = (self.end_s - self.begin_s) % DAY_S or DAY_S
        since = (second - self.begin_s) % DAY_S
        return length - since if since < length else 0.0

    def wait_s(self, second: float) -> float:
        """Seconds until it begins next."""
        return (self.begin_s - second) % DAY_S


def local_time(clock_unix_s: float, *, utc: bool = False) -> LocalTime | None:
    """Local time by the system's time zone, or in UTC; None if the clock was never set."""
    if not EARLIEST_CLOCK_UNIX_S <= clock_unix_s <= LATEST_CLOCK_UNIX_S:
        return None
    found = time.gmtime(clock_unix_s) if utc else time.localtime(clock_unix_s)
    second = found.tm_hour * HOUR_S + found.tm_min * 60.0 + found.tm_sec + clock_unix_s % 1.0
    year, month = found.tm_year + found.tm_mon // 12, found.tm_mon % 12 + 1
    next_month_unix_s = _unix_s(year, month, utc=utc)
    return LocalTime(
        day=found.tm_year * 366 + found.tm_yday,
        month=found.tm_year * 12 + found.tm_mon,
        day_second=second,
        week_second=found.tm_wday * DAY_S + second,
        day_left_s=max(1.0, DAY_S - second),
        month_left_s=max(1.0, next_month_unix_s - clock_unix_s),
    )


def _unix_s(year: int, month: int, *, utc: bool) -> float:
    """When a month begins."""
    first = (year, month, 1, 0, 0, 0, 0, 0, -1)
    if not utc:
        return time.mktime(first)
    from calendar import timegm

    return float(timegm(first))


def parse_hours(text: str) -> tuple[Span, ...]:
    """Spans of the day, as ``limits.hours`` has them: ``22:00-06:00, 12:00-13:30``.

    Raises:
        ConfigError: it is not written so, or a span is empty.
    """
    spans = []
    for part in text.split(","):
        found = _SPAN.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f'limits.hours = "{text}" is no list of hours; write "22:00-06:00, 12:00-13:30"')
        hours, minutes, end_hours, end_minutes = (int(number) for number in found.groups())
        begin_s, end_s = hours * HOUR_S + minutes * 60.0, end_hours * HOUR_S + end_minutes * 60.0
        if begin_s == end_s or max(begin_s, end_s) > DAY_S:
            raise ConfigError(f'limits.hours: "{part.strip()}" is no span of a day; write "00:00-24:00" for all of it')
        spans.append(Span(begin_s, end_s))
    return tuple(spans)


def hours_left_s(spans: Sequence[Span], day_second: float) -> float:
    """Seconds until none of the spans holds any more, a day at most; 0: none holds now."""
    left_s = 0.0
    for _ in range(len(spans) + 1):  # spans that follow each other
        more_s = max((span.left_s((day_second + left_s) % DAY_S) for span in spans), default=0.0)
        left_s += more_s
        if more_s == 0.0 or left_s >= DAY_S:
            break
    return min(left_s, DAY_S)


def hours_wait_s(spans: Sequence[Span], day_second: float) -> float:
    """Seconds until one of the spans begins."""
    return min(span.wait_s(day_second) for span in spans)
