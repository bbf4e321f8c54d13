"""Curves of cost as SVG: staircases of what each GPU type costs, with what was certified above.

Colours are plain rules with a dark twin, not variables, so that programs which only draw SVG show
them too.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.pareto import Curve, Point, Unit

WIDTH, HEIGHT = 560.0, 310.0  # of one curve
LEFT, RIGHT, TOP, BOTTOM = 52.0, 18.0, 16.0, 42.0
EDGE = 26.0  # beyond the outermost points
TITLE = 34.0  # above each curve of a sheet
GAP = 26.0
HEAD = 92.0  # of a sheet: its title and legend
TONES = (  # on light, on dark: told apart by those who see colours differently, too
    ("#4477aa", "#6f9fd0"),
    ("#e59c3c", "#e8b060"),
    ("#228877", "#4fb8a4"),
    ("#aa4499", "#cf82c2"),
    ("#999933", "#c2c266"),
    ("#cc6677", "#e08e9c"),
    ("#66aadd", "#9accee"),
    ("#77736b", "#aaa69d"),
)
LIGHT = {"card": "#ffffff", "ink": "#16202c", "soft": "#5b6776", "rule": "#e2e6eb"}
DARK = {"card": "#171e27", "ink": "#e8edf3", "soft": "#97a4b3", "rule": "#2a3441"}
SURE = ("#0b7a4b", "#5fd6a0")
MARKS = (("dot", "planned"), ("sure", "holds in simulation"), ("unsure", "does not hold"))
PART = "pale: only so many are served"
FONT = '"Segoe UI", Roboto, "DejaVu Sans", sans-serif'


def style() -> str:
    """Rules for everything that is drawn here."""
    fixed = (
        f"text{{font:12px system-ui,{FONT};font-variant-numeric:tabular-nums}}"
        "rect{shape-rendering:crispEdges}"
        ".title{font-size:15px;font-weight:600}.sheet{font-size:21px;font-weight:650}"
        ".asked{font-weight:650;font-size:13px}.edge,.grid,.at{fill:none}"
        ".edge{stroke-width:2}.at{stroke-dasharray:4 3}.part{fill-opacity:.3}"
        ".said{paint-order:stroke;stroke-width:4px;stroke-linejoin:round}"
    )
    return f"{fixed}{_theme(LIGHT, 0)}@media(prefers-color-scheme:dark){{{_theme(DARK, 1)}}}"


def _theme(colours: dict[str, str], at: int) -> str:
    tones = "".join(f".tone{number}{{fill:{tone[at]}}}" for number, tone in enumerate(TONES))
    card, ink, soft, rule = (colours[name] for name in ("card", "ink", "soft", "rule"))
    return (
        f".card{{fill:{card}}}.ink{{fill:{ink}}}.soft{{fill:{soft}}}.said{{stroke:{card}}}"
        f".grid{{stroke:{rule}}}.edge{{stroke:{ink}}}.at{{stroke:{soft}}}"
        f".dot{{fill:{card};stroke:{ink};stroke-width:2}}"
        f".sure{{fill:{SURE[at]};stroke:{card};stroke-width:1.5}}"
        f".unsure{{fill:none;stroke:{SURE[at]};stroke-width:2}}{tones}"
    )


def gpus(curves: Sequence[Curve]) -> list[str]:
    """Every GPU type of the plans, what costs most first: their order, and that of the tones."""
    costs: dict[str, float] = {}
    for curve in curves:
        for point in curve.points:
            for gpu, cost in point.by_gpu.items():
                costs[gpu] = costs.get(gpu, 0.0) + cost
    return sorted(costs, key=lambda gpu: (-costs[gpu], gpu))


def any_part(curves: Sequence[Curve]) -> bool:
    """Whether some plan does not serve all."""
    return any(point.shed > 0 for curve in curves for point in curve.points)


def tone(order: Sequence[str], gpu: str) -> str:
    return f"tone{order.index(gpu) % len(TONES)}"


def panel(curve: Curve, order: Sequence[str]) -> str:
    """One curve, WIDTH × HEIGHT, as the inside of an <svg> or <g>."""
    drawn = _Panel(curve, order)
    return "".join(drawn.parts())


def sheet(title: str, curves: Sequence[tuple[str, Curve]], order: Sequence[str]) -> str:
    """All curves, two a row, as a file of its own."""
    wide, high = size(len(curves))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:g}" height="{high:g}" '
        f'viewBox="0 0 {wide:g} {high:g}"><style>{style()}</style>'
        f'<rect class="card" width="{wide:g}" height="{high:g}"/>',
        _text(GAP, 38, title, "sheet ink"),
        _legend(order, GAP, 62, part=any_part([curve for _, curve in curves])),
    ]
    for at, (name, curve) in enumerate(curves):
        x = GAP + at % 2 * (WIDTH + GAP)
        y = HEAD + at // 2 * (TITLE + HEIGHT + GAP)
        parts.append(
            f'<g transform="translate({x:g} {y:g})">{_text(0, 20, name, "title ink")}'
            f'<g transform="translate(0 {TITLE:g})">{panel(curve, order)}</g></g>'
        )
    return "".join([*parts, "</svg>"])


def size(curves: int) -> tuple[float, float]:
    """Width and height of a sheet."""
    rows = math.ceil(curves / 2)
    return 2 * WIDTH + 3 * GAP, HEAD + rows * (TITLE + HEIGHT + GAP)


def _legend(order: Sequence[str], x: float, y: float, *, part: bool) -> str:
    parts = []
    for gpu in order:
        parts.append(
            f'<rect class="{tone(order, gpu)}" x="{x:g}" y="{y:g}" width="12" height="12" rx="3"/>'
            + _text(x + 18, y + 11, gpu, "ink")
        )
        x += 40 + 7.5 * len(gpu)
    for kind, name in MARKS:
        mark = f'<circle class="{kind}" cx="{x + 6:g}" cy="{y + 6:g}" r="4.5"/>'
        parts.append(mark + _text(x + 18, y + 11, name, "soft"))
        x += 44 + 6.5 * len(name)
    return "".join(parts) + (_text(x, y + 11, PART, "soft") if part else "")


class _Panel:
    def __init__(self, curve: Curve, order: Sequence[str]) -> None:
        self._curve = curve
        self._order = order
        self._points = sorted(curve.points, key=lambda point: point.value)
        self._rises = self._points[-1].factor == curve.points[0].factor  # more to the right
        places = [_place(curve.unit, point.value) for point in self._points]
        self._low, self._high = places[0], places[-1]
        costs = [point.cost for point in self._points]
        costs += [p.certified.cost for p in self._points if p.certified]
        most = max(costs) or 1.0  # nothing costs anything where nothing is served
        self._step = _round(most / 4)
        self._top = self._step * math.ceil(most * 1.12 / self._step)

    def parts(self) -> list[str]:
        return [
            *self._grid(),
            *(self._areas(at) for at in range(len(self._points))),
            self._edge(),
            self._asked(),
            *(self._marks(point) for point in self._points),
        ]

    def _x(self, point: Point) -> float:
        place = _place(self._curve.unit, point.value)
        share = (place - self._low) / ((self._high - self._low) or 1.0)
        left, right = LEFT + EDGE, WIDTH - RIGHT - EDGE
        return left + share * (right - left)

    def _y(self, cost: float) -> float:
        return HEIGHT - BOTTOM - cost / self._top * (HEIGHT - BOTTOM - TOP)

    def _span(self, at: int) -> tuple[float, float]:
        """A plan is one for less as well: from its point to the next that asks for less."""
        here = self._x(self._points[at])
        if self._rises:
            return (self._x(self._points[at - 1]) if at else LEFT), here
        last = at + 1 == len(self._points)
        return here, (WIDTH - RIGHT if last else self._x(self._points[at + 1]))

    def _grid(self) -> list[str]:
        parts = []
        for number in range(round(self._top / self._step) + 1):
            cost = number * self._step
            y = self._y(cost)
            parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')
            parts.append(_text(LEFT - 8, y + 4, money(cost), "soft", "end"))
        for point in self._points:
            said = label(self._curve.unit, point.value)
            parts.append(_text(self._x(point), HEIGHT - BOTTOM + 18, said, "soft", "middle"))
        return parts

    def _areas(self, at: int) -> str:
        point = self._points[at]
        left, right = self._span(at)
        said = f"<title>{escape(told(self._curve, point))}</title>"
        part = " part" if point.shed > 0 else ""
        parts, below = [], 0.0
        for gpu in self._order:
            cost = point.by_gpu.get(gpu, 0.0)
            if not cost:
                continue
            top = self._y(below + cost)
            parts.append(
                f'<rect class="{tone(self._order, gpu)}{part}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{right - left:.1f}" height="{self._y(below) - top:.1f}">{said}</rect>'
            )
            below += cost
        return "".join(parts)

    def _edge(self) -> str:
        path: list[str] = []
        for at, point in enumerate(self._points):
            left, right = self._span(at)
            path.append(f"{'L' if path else 'M'}{left:.1f} {self._y(point.cost):.1f}H{right:.1f}")
        return f'<path class="edge" d="{"".join(path)}"/>'

    def _asked(self) -> str:
        point = self._curve.asked
        sure = point.certified
        cost = sure.cost if sure and sure.holds else point.cost
        x = self._x(point)
        right = x < WIDTH / 2
        said = _text(
            x + (7 if right else -7),
            TOP + 11,
            f"as asked: {money(cost)} $/h",
            "asked ink said",
            "start" if right else "end",
        )
        return f'<path class="at" d="M{x:.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"/>{said}'

    def _marks(self, point: Point) -> str:
        x, y = self._x(point), self._y(point.cost)
        said = f"<title>{escape(told(self._curve, point))}</title>"
        parts = [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4">{said}</circle>']
        if point.shed > 0:
            share = served(point).removesuffix(" served")
            parts.append(_text(x, y - 9, share, "soft said", "middle"))
        if sure := point.certified:
            kind = "sure" if sure.holds else "unsure"
            at = self._y(sure.cost)
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{at:.1f}" r="5">{said}</circle>')
        return "".join(parts)


def told(curve: Curve, point: Point) -> str:
    """A point in words."""
    text = f"{curve.name} {label(curve.unit, point.value)}: {point.cost:.2f} $/h: "
    text += mix(curve, point)
    if point.shed > 0:
        text += f"; {point.shed:.1%} of requests are not served"
    if sure := point.certified:
        text += (
            f"; holds in simulation for {sure.cost:.2f} $/h ({sure.attained:.1%} in time)"
            if sure.holds
            else f"; simulated: {sure.attained:.1%} in time, not enough"
        )
    return text


def mix(curve: Curve, point: Point) -> str:
    """The replicas of a point, those that hold if known; a lone model is not named each time."""
    sure = point.certified
    replicas = sure.replicas if sure and sure.holds else point.replicas
    return ", ".join(
        f"{count} × {name.removeprefix(curve.model).lstrip()}" for name, count in replicas.items()
    )


def served(point: Point) -> str:
    """Never all where some are not."""
    return f"{math.floor((1 - point.shed) * 1000) / 10:g} % served"


def label(unit: Unit, value: float) -> str:
    if unit == "share":
        return f"{value * 100:.4g} %"
    if unit == "ms":
        return f"{value / 1e3:.3g} s" if value >= 1000 else f"{value:.3g} ms"
    return f"{value:.3g}/s" if unit == "requests/s" else f"× {value:g}"


def money(cost: float) -> str:
    """$/h in as many digits as are read."""
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.4g}"


def _place(unit: Unit, value: float) -> float:
    """Shares by their nines, limits by ratio, rates as they are."""
    if unit == "share":
        return -math.log10(max(1 - value, 1e-9))
    return value if unit == "requests/s" else math.log(value)


def _round(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * by for by in (1, 2, 2.5, 5, 10) if step <= power * by * 1.001)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
