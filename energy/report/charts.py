"""The charts of the reports. Each is drawn for a given width in pixels, so that texts keep their size on a phone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from energy.report.svg import Canvas, Scale, cut, linear_labels, log_ticks, nice_end, text_px
from energy.report.units import digits, prefix_for

if TYPE_CHECKING:
    from collections.abc import Sequence

NARROW_PX = 560.0  # below, labels stand above their bars
_RIGHT_PX = 14.0
_AXIS_PX = 44.0  # ticks and title below a chart


class Part(NamedTuple):
    """A piece of a bar; ``css`` is its colour, hatched for what is modelled; ``words`` say what it is."""

    value: float
    css: str
    words: str


class Bar(NamedTuple):
    """One bar of stacked parts. ``text`` is its value in words; ``low`` and ``high`` bound an interval."""

    label: str
    parts: tuple[Part, ...]
    text: str
    low: float | None = None
    high: float | None = None


class Spot(NamedTuple):
    """A point with an interval along the value axis."""

    x: float
    y: float
    words: str
    css: str = "dot"
    low: float | None = None
    high: float | None = None


def bars(rows: Sequence[Bar], title: str, unit: str, *, width: float, label: str) -> str:
    """Horizontal bars that share an axis from 0."""
    narrow = width < NARROW_PX
    most = max((max(sum(part.value for part in row.parts), row.high or 0.0) for row in rows), default=0.0)
    factor, named = prefix_for(most, unit)
    row_px, bar_px = (40.0, 15.0) if narrow else (25.0, 15.0)
    values_px = max((text_px(row.text) for row in rows), default=0.0) + 8
    labels_px = 0.0 if narrow else min(240.0, max((text_px(row.label) for row in rows), default=0.0) + 10)
    left = 6.0 if narrow else labels_px
    right = width - (_RIGHT_PX if narrow else values_px + 6)
    ticks = 4 if narrow else 6
    end = nice_end(most / factor, ticks)
    scale = Scale(0.0, end, left, right)
    bottom = 6 + row_px * len(rows)
    canvas = Canvas(width, bottom + _AXIS_PX, label)
    canvas.bottom_axis(scale, bottom, 2, f"{title}, {named}", linear_labels(0.0, end, ticks))
    for index, row in enumerate(rows):
        top = 6 + index * row_px
        if narrow:
            canvas.text(left, top + 12, cut(row.label, width - values_px - 16), title=row.label)
            canvas.text(width - 2, top + 12, row.text, "value", anchor="end")
            top += 18
        else:
            canvas.text(labels_px - 8, top + 14, cut(row.label, labels_px - 8), anchor="end", title=row.label)
            canvas.text(width - 2, top + 14, row.text, "value", anchor="end")
            top += 3
        at = 0.0
        for part in row.parts:
            x = scale(at / factor)
            at += part.value
            shown = scale(at / factor) - x
            canvas.rect(x, top, shown, bar_px, part.css, title=f"{row.label}: {part.words}")
        if row.low is not None and row.high is not None:
            _whisker(canvas, scale(row.low / factor), scale(row.high / factor), top + bar_px / 2)
    return canvas.svg()


def columns(rows: Sequence[Bar], title: str, unit: str, bottom_title: str, *, width: float, label: str) -> str:
    """Upright columns of stacked parts, side by side."""
    most = max((sum(part.value for part in row.parts) for row in rows), default=0.0)
    factor, named = prefix_for(most, unit)
    end = nice_end(most / factor, 5)
    height, left, top = 304.0, 52.0, 34.0
    bottom = height - _AXIS_PX
    canvas = Canvas(width, height, label)
    up = Scale(0.0, end, bottom, top)
    right = width - _RIGHT_PX
    canvas.left_axis(up, left, right, f"{title}, {named}", linear_labels(0.0, end, 5))
    slot = (right - left) / max(1, len(rows))
    column_px = min(48.0, max(1.0, slot * 0.78))
    free = 0.0
    for index, row in enumerate(rows):
        middle = left + (index + 0.5) * slot
        at = 0.0
        for part in row.parts:
            low = up(at / factor)
            at += part.value
            high = up(at / factor)
            canvas.rect(
                middle - column_px / 2, high, column_px, low - high, part.css, title=f"{row.label}: {part.words}"
            )
        half = text_px(row.label) / 2
        if middle - half >= free and middle + half <= width:
            canvas.text(middle, bottom + 16, row.label, "tick", anchor="middle")
            free = middle + half + 10
    canvas.line(left, bottom, right, bottom)
    canvas.text((left + right) / 2, bottom + 34, bottom_title, "title", anchor="middle")
    return canvas.svg()


def curve(points: Sequence[Spot], x_title: str, x_unit: str, y_title: str, *, width: float, label: str) -> str:
    """Points joined by a line, from x = 0."""
    most = max((point.x for point in points), default=0.0)
    factor, named = prefix_for(most, x_unit)
    height, left, top = 304.0, 46.0, 34.0
    bottom = height - _AXIS_PX
    low, high = min(point.y for point in points), max(point.y for point in points)
    space = max(2.0, (high - low) * 0.08)
    up = Scale(max(0.0, low - space), min(100.0, high + space) if high <= 100 else high + space, bottom, top)
    end = most / factor * 1.02 or 1.0
    along = Scale(0.0, end, left, width - _RIGHT_PX)
    canvas = Canvas(width, height, label)
    canvas.left_axis(up, left, width - _RIGHT_PX, y_title, linear_labels(up.low, up.high, 5))
    ticks = linear_labels(0.0, end, 4 if width < NARROW_PX else 7)
    canvas.bottom_axis(along, bottom, top, f"{x_title}, {named}", ticks)
    placed = [(along(point.x / factor), up(point.y)) for point in points]
    canvas.path(placed, "curve")
    for point, (x, y) in zip(points, placed, strict=True):
        canvas.circle(x, y, 3.2, point.css, title=point.words)
    return canvas.svg()


def against(points: Sequence[Spot], x_title: str, y_title: str, unit: str, *, width: float, label: str) -> str:
    """Points on logarithmic axes with the same range, and the line on which both are equal; values above 0."""
    ends = [value for point in points for value in (point.x, point.y, point.low, point.high) if value]
    low, high = min(ends) / 1.3, max(ends) * 1.3
    side = min(width, 560.0)
    left, top = 62.0, 34.0
    right, bottom = side - _RIGHT_PX, side - _AXIS_PX
    along, up = Scale(low, high, left, right, True), Scale(low, high, bottom, top, True)
    canvas = Canvas(side, side, label)
    ticks = log_labels(low, high, unit)
    canvas.left_axis(up, left, right, y_title, _sparse(ticks, 8))
    canvas.bottom_axis(along, bottom, top, x_title, ticks)
    canvas.path([(along(low), up(low)), (along(high), up(high))], "equal")
    for point in points:
        x = along(point.x)
        if point.low is not None and point.high is not None:
            canvas.line(x, up(point.low), x, up(point.high), "interval")
        canvas.circle(x, up(point.y), 3.6, point.css, title=point.words)
    return canvas.svg()


def ratios(rows: Sequence[Bar], title: str, *, width: float, label: str) -> str:
    """For each row the interval of a ratio and its middle (one part), around 1."""
    narrow = width < NARROW_PX
    values = [value for row in rows for value in (row.low, row.high, row.parts[0].value) if value is not None]
    span = min(2.0, max(0.05, *(abs(value - 1) for value in values)) * 1.1)
    low, high = max(0.0, 1 - span), 1 + span
    row_px = 40.0 if narrow else 26.0
    values_px = max(text_px(row.text) for row in rows) + 10
    labels_px = 0.0 if narrow else min(260.0, max(text_px(row.label) for row in rows) + 12)
    left, right = (8.0, width - _RIGHT_PX) if narrow else (labels_px, width - values_px - 6)
    scale, bottom = Scale(low, high, left, right), 6 + row_px * len(rows)
    canvas = Canvas(width, bottom + _AXIS_PX, label)
    ticks = linear_labels(low, high, 4 if narrow else 8)
    canvas.bottom_axis(scale, bottom, 2, title, ticks)
    canvas.line(scale(1.0), 2, scale(1.0), bottom, "equal")
    for index, row in enumerate(rows):
        top = 6 + index * row_px
        if narrow:
            canvas.text(left, top + 12, cut(row.label, width - values_px - 16), title=row.label)
            canvas.text(width - 2, top + 12, row.text, "value", anchor="end")
            y = top + 26
        else:
            canvas.text(labels_px - 10, top + 17, cut(row.label, labels_px - 10), anchor="end", title=row.label)
            canvas.text(width - 2, top + 17, row.text, "value", anchor="end")
            y = top + 13
        if row.low is not None and row.high is not None:
            _whisker(canvas, scale(row.low), scale(row.high), y)
        canvas.circle(scale(row.parts[0].value), y, 5, row.parts[0].css, title=f"{row.label}: {row.parts[0].words}")
    return canvas.svg()


def strips(rows: Sequence[tuple[str, Sequence[Spot]]], title: str, unit: str, *, width: float, label: str) -> str:
    """One line of points per row on a shared logarithmic axis; values above 0."""
    narrow = width < NARROW_PX
    values = [spot.x for _, spots in rows for spot in spots]
    low, high = min(values) / 1.4, max(values) * 1.4
    row_px = 38.0 if narrow else 24.0
    labels_px = 0.0 if narrow else min(260.0, max(text_px(name) for name, _ in rows) + 12)
    scale = Scale(low, high, 8.0 if narrow else labels_px, width - _RIGHT_PX, True)
    bottom = 6 + row_px * len(rows)
    canvas = Canvas(width, bottom + _AXIS_PX, label)
    canvas.bottom_axis(scale, bottom, 2, title, log_labels(low, high, unit))
    for index, (name, spots) in enumerate(rows):
        top = 6 + index * row_px
        if narrow:
            canvas.text(8, top + 12, cut(name, width - 16), title=name)
        else:
            canvas.text(labels_px - 10, top + 16, cut(name, labels_px - 10), anchor="end", title=name)
        y = top + (26 if narrow else 12)
        for spot in spots:
            canvas.circle(scale(spot.x), y, 4, spot.css, title=spot.words)
    return canvas.svg()


def power(
    samples: Sequence[tuple[float, float]],
    windows: Sequence[tuple[str, float, float]],
    idle_watts: float | None,
    title: str,
    *,
    width: float,
    label: str,
) -> str:
    """Power over time: mean and range of what falls into a pixel or two, and below it the windows."""
    start = min([samples[0][0], *(window[1] for window in windows)])
    end = max([samples[-1][0], *(window[2] for window in windows)])
    height, left, top = 324.0, 50.0, 34.0
    bottom, right = height - _AXIS_PX - (28 if windows else 0), width - _RIGHT_PX
    most = nice_end(max([watts for _, watts in samples] + [idle_watts or 0.0]), 5)
    along, up = Scale(start, max(end, start + 1e-3), left, right), Scale(0.0, most, bottom, top)
    canvas = Canvas(width, height, label)
    canvas.left_axis(up, left, right, f"{title}, W", linear_labels(0.0, most, 5))
    axis = height - _AXIS_PX
    canvas.bottom_axis(along, axis, top, "time, s", linear_labels(start, end, 4 if width < NARROW_PX else 8))
    for name, begin, stop in windows:
        x, wide = along(begin), along(stop) - along(begin)
        canvas.rect(x, top, wide, bottom - top, "shade")
        canvas.rect(x, axis - 22, max(1.0, wide - 1), 18, "window", title=f"{name}: {begin:.1f} to {stop:.1f} s")
        if wide > 44:
            canvas.text(x + 4, axis - 9, cut(name, wide - 8), "inwindow", title=name)
    for piece in _pieces(samples, along):
        canvas.path(
            [(x, up(high)) for x, _, _, high in piece] + [(x, up(low)) for x, low, _, _ in piece[::-1]],
            "range",
            closed=True,
        )
        canvas.path([(x, up(mean)) for x, _, mean, _ in piece], "curve")
    if idle_watts is not None:
        canvas.line(left, up(idle_watts), right, up(idle_watts), "idle")
        canvas.text(right, top - 14, f"dashed: idle {digits(idle_watts)} W", "title", anchor="end")
    return canvas.svg()


def log_labels(low: float, high: float, unit: str) -> dict[float, str]:
    """Ticks of a logarithmic axis and their texts."""
    ticks = {}
    for value in log_ticks(low, high):
        factor, named = prefix_for(value, unit)
        ticks[value] = f"{value / factor:g} {named}"
    return ticks


def _pieces(samples: Sequence[tuple[float, float]], along: Scale) -> list[list[tuple[float, float, float, float]]]:
    """Stretches without a gap, as (x, lowest, mean, highest) for every two pixels."""
    steps = sorted(later[0] - earlier[0] for earlier, later in pairwise(samples))
    longest = 5 * steps[len(steps) // 2] if steps else 0.0
    pieces: list[list[tuple[float, float, float, float]]] = [[]]
    held: list[float] = []
    place, before = 0, samples[0][0]
    for at, watts in samples:
        here = int(along(at) / 2)
        if held and (here != place or at - before > longest):
            pieces[-1].append((place * 2 + 1, min(held), sum(held) / len(held), max(held)))
            held = []
        if at - before > longest:
            pieces.append([])
        held.append(watts)
        place, before = here, at
    pieces[-1].append((place * 2 + 1, min(held), sum(held) / len(held), max(held)))
    return pieces


def _sparse(ticks: dict[float, str], most: int) -> dict[float, str]:
    every = math.ceil(len(ticks) / most)
    return {value: text for index, (value, text) in enumerate(sorted(ticks.items())) if index % every == 0}


def _whisker(canvas: Canvas, low: float, high: float, y: float) -> None:
    canvas.line(low, y, high, y, "interval")
    canvas.line(low, y - 4, low, y + 4, "interval")
    canvas.line(high, y - 4, high, y + 4, "interval")
