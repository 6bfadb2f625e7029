"""Drawing in SVG: text, lines, boxes and axes. Colours are CSS classes of the page, so that they follow its theme."""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

FONT_PX = 12.5
_CHARACTER_PX = 0.58 * FONT_PX  # mean width of a character, for what must fit


class Scale(NamedTuple):
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start_px: float
    end_px: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where ``value`` stands, never outside the axis."""
        if self.logarithmic:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        share = 0.0 if high <= low else (value - low) / (high - low)
        return self.start_px + min(1.0, max(0.0, share)) * (self.end_px - self.start_px)


class Canvas:
    """One drawing. ``label`` says in words what it shows, for those who cannot see it."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, css: str = "", *, anchor: str = "start", title: str = "") -> None:
        anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._parts.append(f'<text x="{_n(x)}" y="{_n(y)}"{_class(css)}{anchored}>{_title(title)}{escape(text)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, *, title: str = "") -> None:
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(0.0, width))}" height="{_n(max(0.0, height))}"{_class(css)}>'
            f"{_title(title)}</rect>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str = "axis") -> None:
        self._parts.append(f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"{_class(css)}/>')

    def circle(self, x: float, y: float, radius: float, css: str, *, title: str = "") -> None:
        self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"{_class(css)}>{_title(title)}</circle>')

    def path(self, points: list[tuple[float, float]], css: str, *, closed: bool = False) -> None:
        """Straight lines from point to point."""
        if points:
            steps = " ".join(f"{'L' if index else 'M'}{_n(x)} {_n(y)}" for index, (x, y) in enumerate(points))
            self._parts.append(f'<path d="{steps}{" Z" if closed else ""}"{_class(css)}/>')

    def bottom_axis(self, scale: Scale, y: float, top: float, title: str, ticks: dict[float, str]) -> None:
        """Ticks with grid lines up to ``top``, and below them what is counted and its unit."""
        ends = _shown(ticks, scale)
        for value, text in ticks.items():
            x = scale(value)
            self.line(x, top, x, y, "grid")
            if value in ends:
                half = len(text) * _CHARACTER_PX / 2
                self.text(min(max(x, half), self.width - half), y + 16, text, "tick", anchor="middle")
        self.line(scale.start_px, y, scale.end_px, y)
        self.text((scale.start_px + scale.end_px) / 2, y + 34, title, "title", anchor="middle")

    def left_axis(self, scale: Scale, x: float, right: float, title: str, ticks: dict[float, str]) -> None:
        """Ticks with grid lines to ``right``, and above them what is counted and its unit."""
        for value, text in ticks.items():
            y = scale(value)
            self.line(x, y, right, y, "grid")
            self.text(x - 6, y + 4, text, "tick", anchor="end")
        self.text(2, min(scale.start_px, scale.end_px) - 14, title, "title")

    def svg(self) -> str:
        """The drawing as an element of HTML."""
        return (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}" '
            f'height="{_n(self.height)}" role="img" aria-label="{escape(self.label, quote=True)}">'
            f"{''.join(self._parts)}</svg>"
        )


def text_px(text: str) -> float:
    """About how wide a text is."""
    return len(text) * _CHARACTER_PX


def cut(text: str, width_px: float) -> str:
    """As much of a text as fits, with an ellipsis if that is not all of it."""
    most = max(1, int(width_px / _CHARACTER_PX))
    return text if len(text) <= most else text[: max(1, most - 1)] + "\u2026"


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """At most about ``count`` round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def nice_end(high: float, count: int) -> float:
    """The round number at or above ``high`` at which an axis from 0 may end."""
    if high <= 0:
        return 1.0
    ticks = linear_ticks(0.0, high, count)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high
    return ticks[-1] if ticks[-1] >= high * 0.999 else ticks[-1] + step


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def tick_text(value: float, step: float) -> str:
    """A tick with as many places as its step needs."""
    places = 0 if step <= 0 else max(0, -math.floor(math.log10(step) + 1e-9))
    if step > 0 and abs(round(step, places) - step) > 1e-9 * step:  # steps of 2.5
        places += 1
    return f"{value:.{places}f}"


def linear_labels(low: float, high: float, count: int) -> dict[float, str]:
    """Ticks and their texts."""
    ticks = linear_ticks(low, high, count)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return {tick: tick_text(tick, step) for tick in ticks}


def _shown(ticks: dict[float, str], scale: Scale) -> set[float]:
    """Those ticks whose texts do not run into one another."""
    shown, free = set(), -math.inf
    for value, text in sorted(ticks.items(), key=lambda item: scale(item[0])):
        half = len(text) * _CHARACTER_PX / 2
        if scale(value) - half >= free:
            shown.add(value)
            free = scale(value) + half + 8
    return shown


def _n(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be drawn")
    return f"{value:.1f}".removesuffix(".0")


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
