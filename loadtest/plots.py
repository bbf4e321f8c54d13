"""Charts as inline SVG, drawn by CSS classes so that they follow the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
Label = Callable[[float], str]

_WIDTH, _HEIGHT = 560.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 14.0, 40.0
_MOST_POINTS = 240


class Series(NamedTuple):
    """A line; `tone` 1-4 picks its colour, `steps` draws it as a staircase."""

    name: str
    points: Points
    tone: int = 1
    steps: bool = False
    dots: bool = False


class Mark(NamedTuple):
    """A vertical line at x, or a horizontal one at y, with a word beside it."""

    name: str
    x: float | None = None
    y: float | None = None


class Band(NamedTuple):
    """A shaded stretch of the x axis."""

    begin: float
    end: float


class Axis:
    """Maps values to pixels, linearly or by logarithm, and knows its round ticks."""

    def __init__(
        self, low: float, high: float, pixels: tuple[float, float], label: Label, *, log: bool
    ) -> None:
        self.log = log
        self.label = label
        self._pixels = pixels
        self.low, self.high = low, high
        if high <= low:
            self.high = low * 10 if log else low + 1

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        begin, end = self._pixels
        return begin + (at - low) / (high - low) * (end - begin)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps: tuple[int, ...] = (1, 2, 5) if last - first <= 2 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            step = _round_step((self.high - self.low) / 5)
            begin = math.ceil(self.low / step - 1e-9)
            found = [step * at for at in range(begin, begin + 8)]
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if step <= power * factor * 1.001)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Label,
    y: Label,
    x_log: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    x_title: str = "",
) -> str:
    """A figure of lines with a caption and a legend; `` when no series has points."""
    series = [one for one in series if one.points]
    xs = [at for one in series for at, _ in one.points if at > 0 or not x_log]
    if not xs:
        return ""
    xs += [mark.x for mark in marks if mark.x is not None]  # a limit far off says much, too
    ys = [value for one in series for _, value in one.points]
    low, high = y_range or (0.0, max(ys) * 1.05 or 1.0)
    inner = (_LEFT, _WIDTH - _RIGHT)
    x_axis = Axis(min(xs), max(xs), inner, x, log=x_log)
    y_axis = Axis(low, high, (_HEIGHT - _BOTTOM, _TOP), y, log=False)
    parts = [_band(band, x_axis) for band in bands]
    parts += [_grid_x(tick, x_axis) for tick in x_axis.ticks]
    parts += [_grid_y(tick, y_axis) for tick in y_axis.ticks]
    parts += [_line(one, x_axis, y_axis) for one in series]
    parts += [_mark(mark, x_axis, y_axis) for mark in marks]
    if x_title:
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_text(middle, _HEIGHT - 6, x_title, "middle", "axis-title"))
    legend = "".join(
        f'<span class="key tone{one.tone}">{escape(one.name)}</span>' for one in series if one.name
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg><div class=legend>{legend}</div></figure>"
    )


def _thin(points: Points) -> Points:
    """Fewer points than pixels say no less."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(at * step)] for at in range(_MOST_POINTS)]


def _line(one: Series, x: Axis, y: Axis) -> str:
    path: list[str] = []
    before = 0.0
    for at, value in _thin(one.points):
        left, top = x(at if at > 0 or not x.log else x.low), y(value)
        if one.steps and path:
            path.append(f"L{left:.1f} {before:.1f}")
        path.append(f"{'L' if path else 'M'}{left:.1f} {top:.1f}")
        before = top
    line = f'<path class="line tone{one.tone}" d="{"".join(path)}"/>'
    if not one.dots:
        return line
    return line + "".join(
        f'<circle class="dot tone{one.tone}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3.5"/>'
        for at, value in one.points
    )


def _grid_x(tick: float, axis: Axis) -> str:
    at = axis(tick)
    return f'<path class="grid" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>' + _text(
        at, _HEIGHT - _BOTTOM + 15, axis.label(tick), "middle", "tick"
    )


def _grid_y(tick: float, axis: Axis) -> str:
    at = axis(tick)
    return f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>' + _text(
        _LEFT - 6, at + 4, axis.label(tick), "end", "tick"
    )


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    if mark.x is not None and x.low <= mark.x <= x.high:
        at = x(mark.x)
        side = "end" if at > _WIDTH * 0.7 else "start"
        shift = -5 if side == "end" else 5
        return f'<path class="mark" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>' + _text(
            at + shift, _HEIGHT - _BOTTOM - 8, mark.name, side, "mark-text"
        )
    if mark.y is not None and y.low <= mark.y <= y.high:
        at = y(mark.y)
        return f'<path class="mark" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>' + _text(
            _LEFT + 6, at - 5, mark.name, "start", "mark-text"
        )
    return ""


def _band(band: Band, axis: Axis) -> str:
    begin, end = axis(band.begin), axis(band.end)
    return (
        f'<rect class="band" x="{begin:.1f}" y="{_TOP}" width="{max(1, end - begin):.1f}" '
        f'height="{_HEIGHT - _BOTTOM - _TOP}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
