"""The page of `motley plan --pareto`: one file, no scripts, nothing fetched."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from scheduler import pareto_svg as drawn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.pareto import Curve, Point

HOURS = 730  # of a month
ASKED = {  # axis: (its figure's title, what the tiles try, and how that is said)
    "attainment": ("share of requests in time", ((0.1, "a tenth as many late"),)),
    "TTFT": ("limit on TTFT", ((0.5, "half the TTFT"), (2.0, "twice the TTFT"))),
    "TPOT": ("limit on TPOT", ((0.5, "half the TPOT"), (2.0, "twice the TPOT"))),
    "rate": ("requests a second", ((2.0, "twice the rate"),)),
}


def titles(curves: Sequence[Curve]) -> list[tuple[str, Curve]]:
    """Each curve with what is written above it."""
    return [(f"$/h by {_by(curve)}", curve) for curve in curves]


def _by(curve: Curve) -> str:
    if curve.unit != "×":
        return ASKED[curve.name][0]
    name = "share of late requests" if curve.name == "attainment" else ASKED[curve.name][0]
    return f"{name}, of what each model is asked for"


def page(asked: str, curves: Sequence[Curve], facts: Iterable[tuple[str, str]]) -> str:
    """A whole HTML document; `asked` says what the service is, `facts` how this was reckoned."""
    order = drawn.gpus(curves)
    style = (resources.files("scheduler") / "pareto.css").read_text(encoding="utf-8")
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {drawn.WIDTH:g} {drawn.HEIGHT:g}" role="img" '
        f'aria-label="{escape(title)}">{drawn.panel(curve, order)}</svg></figure>'
        for title, curve in titles(curves)
    )
    rows = "".join(f"<dt>{escape(n)}</dt><dd>{escape(said)}</dd>" for n, said in facts)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>What it costs: {escape(asked)}</title><style>{style}{drawn.style()}</style><main>"
        f"{_head(asked, curves[0])}{_tiles(curves)}{_legend(order, curves)}"
        f"<section class=charts>{figures}</section>{''.join(_table(each) for each in curves)}"
        f"<section><h2>How this was reckoned</h2><dl>{rows}</dl></section></main></html>"
    )


def _head(asked: str, curve: Curve) -> str:
    point = curve.asked
    cost, sure = point.cost, point.certified
    badge = '<span class="badge plain">not simulated</span>'
    if sure and sure.holds:
        cost = sure.cost
        badge = '<span class="badge good">holds in simulation</span>'
    elif sure:
        badge = '<span class="badge bad">does not hold in simulation</span>'
    if point.shed > 0:
        badge += f'<span class="badge bad">{drawn.served(point)}</span>'
    mix = escape(drawn.mix(curve, point))
    premium = f"planned at {point.cost:.2f} $/h, the rest is for chance · " if sure else ""
    return (
        f"<header><div>{badge}</div><div class=figure>{cost:,.2f} <small>$/h</small></div>"
        f"<p class=caption>{escape(asked)}</p><p class=detail>"
        f"{premium if cost > point.cost else ''}{cost * HOURS:,.0f} $ a month · {mix}</p>"
        "</header>"
    )


def _tiles(curves: Sequence[Curve]) -> str:
    tiles = []
    for curve in curves:
        by_factor = {point.factor: point for point in curve.points}
        for factor, said in ASKED[curve.name][1]:
            if other := by_factor.get(factor):
                tiles.append(_tile(said, drawn.label(curve.unit, other.value), curve.asked, other))
    return f"<section class=tiles>{''.join(tiles)}</section>"


def _tile(said: str, value: str, asked: Point, other: Point) -> str:
    more = other.cost - asked.cost
    if other.shed > asked.shed:
        figure, kind = drawn.served(other), "bad"
    else:
        figure = f"{more:+,.2f} $/h" if abs(more) > 0.005 else "costs the same"
        kind = "less" if more < 0 else ""
        value += f" · {more / asked.cost:+.0%}" if asked.cost and figure[0] in "+-" else ""
    return (
        f'<div class=tile><b>{escape(said)}</b><strong class="{kind}">{figure}</strong>'
        f"<small>{escape(value)}</small></div>"
    )


def _legend(order: Sequence[str], curves: Sequence[Curve]) -> str:
    keys = "".join(
        f'<span><svg viewBox="0 0 12 12"><rect class="{drawn.tone(order, gpu)}" width="12" '
        f'height="12" rx="3"/></svg>{escape(gpu)}</span>'
        for gpu in order
    )
    keys += "".join(
        f'<span class=mark><svg viewBox="0 0 12 12"><circle class="{kind}" cx="6" cy="6" r="4.5"/>'
        f"</svg>{name}</span>"
        for kind, name in drawn.MARKS
    )
    notes = ["colours: $/h of each GPU type", *([drawn.PART] if drawn.any_part(curves) else [])]
    keys += "".join(f"<span class=mark>{note}</span>" for note in notes)
    return f"<div class=legend>{keys}</div>"


def _table(curve: Curve) -> str:
    rows = "".join(_row(curve, point) for point in curve.points)
    head = "".join(
        f"<th>{escape(name)}</th>"
        for name in (curve.name, "$/h", "against asked", "in simulation", "replicas")
    )
    return (
        f"<details><summary>Every plan by {escape(_by(curve))}</summary>"
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _row(curve: Curve, point: Point) -> str:
    kind = " class=asked" if point.factor == 1 else ""
    mix = drawn.mix(curve, point)
    cells = (drawn.label(curve.unit, point.value), *figures(curve, point), mix)
    return f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def figures(curve: Curve, point: Point) -> tuple[str, str, str]:
    """Its cost, that against what is asked, and what simulation says."""
    asked = curve.asked
    against = f"{point.cost / asked.cost - 1:+.0%}" if asked.cost else ""
    if point.shed > 0:
        against = drawn.served(point)
    sure = point.certified
    said = ""
    if sure:
        said = f"{sure.cost:.2f}" if sure.holds else f"no: {sure.attained:.0%} in time"
    return f"{point.cost:.2f}", against, said
