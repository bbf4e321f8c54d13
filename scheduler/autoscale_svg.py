"""A day under several policies, drawn: what came, what was paid, what was attained."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from scheduler.pareto_svg import DARK, LIGHT, TONES, style

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scheduler.compare_day import Comparison
    from scheduler.simulate_day import DayReport

Points = list[tuple[float, float]]

WIDTH, LEFT, RIGHT = 1080.0, 62.0, 20.0
HEAD, GAP = 104.0, 58.0
HEIGHTS = {"rate": 120.0, "paid": 220.0, "met": 170.0}
WORST = 0.5  # attainments below are drawn at the lower edge
BIN_S = 900.0  # attainment is drawn of so long


class _Box(NamedTuple):
    """Where a panel lies, and the values at its edges."""

    top: float
    height: float
    hours: float
    low: float
    high: float

    def x(self, hour: float) -> float:
        return LEFT + hour / self.hours * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.top + self.height * (1 - (inside - self.low) / (self.high - self.low))


def picture(answer: Comparison) -> str:
    """An SVG file."""
    high = HEAD + sum(HEIGHTS.values()) + GAP * len(HEIGHTS)
    return "".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {high:g}" '
            f'width="{WIDTH:g}" height="{high:g}">{_style()}'
            f'<rect class="card" width="{WIDTH:g}" height="{high:g}"/>',
            *_legend(answer),
            *_panels(answer),
            "</svg>",
        )
    )


def _style() -> str:
    fixed = (
        ".line{fill:none;stroke-width:1.8;stroke-linejoin:round}.change{stroke-width:1.2}"
        ".wanted{stroke-dasharray:5 4}.came{fill-opacity:.35}"
    )
    dark = f"@media(prefers-color-scheme:dark){{{_strokes(1)}}}"
    return f"<style>{style()}{fixed}{_strokes(0)}{dark}</style>"


def _strokes(theme: int) -> str:
    tones = "".join(f".line{at}{{stroke:{tone[theme]}}}" for at, tone in enumerate(TONES))
    ink = (LIGHT, DARK)[theme]["ink"]
    return f"{tones}.change,.wanted{{stroke:{ink}}}"


def _legend(answer: Comparison) -> Iterator[str]:
    for at, (name, day) in enumerate(answer.days.items()):
        x, y = LEFT + at % 2 * 520, 30 + at // 2 * 26
        switches = sum(day.switches.values())
        said = f"{day.dollars:.2f} $, {day.attainment:.1%} in time, {switches} switches"
        yield f'<rect x="{x:g}" y="{y - 10:g}" width="22" height="5" class="tone{at}"/>'
        yield f'<text class="title ink" x="{x + 30:g}" y="{y:g}">{escape(name)}</text>'
        yield f'<text class="soft" x="{x + 140:g}" y="{y:g}">{said}</text>'


def _panels(answer: Comparison) -> Iterator[str]:
    ours = next(iter(answer.days.values()))
    last, before = ours.windows[-1].start, ours.windows[-2].start if ours.windows[1:] else 0.0
    hours = (2 * last - before) / 3600
    top = HEAD + 14.0
    highest = max(window.rate for window in ours.windows)
    box = _Box(top, HEIGHTS["rate"], hours, 0.0, _round(highest))
    yield from _frame(box, "requests a second, and when the autoscaler changed the plan", "{:g}")
    yield _came(box, ours)
    for change in answer.changes:
        x = box.x(change.at / 3600)
        yield f'<path class="change" d="M{x:.1f} {box.top:g}v10"/>'
    top += HEIGHTS["rate"] + GAP
    dearest = max(window.paid for day in answer.days.values() for window in day.windows)
    box = _Box(top, HEIGHTS["paid"], hours, 0.0, _round(dearest))
    yield from _frame(box, "paid, $ an hour", "{:g}")
    yield from _lines(
        box,
        [_stairs(day, [w.paid for w in day.windows], hours) for day in answer.days.values()],
    )
    top += HEIGHTS["paid"] + GAP
    box = _Box(top, HEIGHTS["met"], hours, WORST, 1.0)
    yield from _frame(box, f"within both limits (of {BIN_S / 60:g} minutes)", "{:.0%}")
    yield from _lines(box, [_met(day) for day in answer.days.values()])
    y = box.y(answer.share)
    yield f'<path class="wanted" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>'


def _frame(box: _Box, title: str, label: str) -> Iterator[str]:
    yield f'<text class="title ink" x="{LEFT:g}" y="{box.top - 12:g}">{escape(title)}</text>'
    for part in range(6):
        value = box.low + (box.high - box.low) * part / 5
        y = box.y(value)
        yield f'<path class="grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>'
        said = label.format(value)
        yield f'<text class="soft" x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{said}</text>'
    step = max(1, math.ceil(box.hours / 12))
    for hour in range(0, math.floor(box.hours) + 1, step):
        x, y = box.x(hour), box.top + box.height + 16
        yield f'<text class="soft" x="{x:.1f}" y="{y:g}" text-anchor="middle">{hour} h</text>'


def _came(box: _Box, day: DayReport) -> str:
    line = _line(box, _stairs(day, [window.rate for window in day.windows], box.hours))
    base = box.y(0.0)
    return f'<path class="came tone7" d="M{LEFT:g} {base:.1f}L{line}V{base:.1f}Z"/>'


def _lines(box: _Box, lines: Sequence[Points]) -> Iterator[str]:
    """Ours last, so that it lies above."""
    for at, points in reversed(list(enumerate(lines))):
        yield f'<path class="line line{at}" d="M{_line(box, points)}"/>'


def _line(box: _Box, points: Points) -> str:
    return "L".join(f"{box.x(hour):.1f} {box.y(value):.1f}" for hour, value in points)


def _stairs(day: DayReport, values: Sequence[float], hours: float) -> Points:
    """Each window's value from its start to the next one's."""
    starts = [window.start / 3600 for window in day.windows]
    points: Points = []
    for value, start, end in zip(values, starts, [*starts[1:], hours], strict=True):
        points += [(start, value), (end, value)]
    return points


def _met(day: DayReport) -> Points:
    came: dict[float, tuple[float, float]] = {}
    for window in day.windows:
        at = window.start // BIN_S
        requests, met = came.get(at, (0.0, 0.0))
        came[at] = requests + window.rate, met + window.rate * window.attainment
    return [
        ((at + 0.5) * BIN_S / 3600, met / requests if requests else 1.0)
        for at, (requests, met) in came.items()
    ]


def _round(value: float) -> float:
    """The next number of one and a half digits, so that fifths of it are round."""
    power: float = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(
        power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if value <= power * step
    )
