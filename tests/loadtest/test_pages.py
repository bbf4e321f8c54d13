"""Charts and pages: well-formed, self-contained, escaped."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from loadtest import page as frame
from loadtest.plots import Band, Mark, Series, chart


def svg(html: str) -> ET.Element:
    return ET.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])


def draw(points, **options) -> str:
    options = {"x": str, "y": str} | options
    return chart("a <chart>", [Series("one & two", points, 1)], **options)


def test_a_chart_draws_its_points_inside_its_frame(checked):
    html = draw(
        [(0, 0), (1, 5), (2, 10)], marks=[Mark("m", x=1.0), Mark("n", y=5.0)], bands=[Band(0, 1)]
    )
    checked(html)
    line = next(p for p in svg(html).iter("path") if p.get("class") == "line tone1")
    corners = [tuple(map(float, c.split())) for c in line.get("d")[1:].split("L")]
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert [y for _, y in corners] == sorted((y for _, y in corners), reverse=True)
    assert all(0 <= x <= 560 and 0 <= y <= 260 for x, y in corners)
    assert "one &amp; two" in html
    assert "a &lt;chart&gt;" in html


@pytest.mark.parametrize("points", [[(5, 5)], [(0, 0), (0, 0)], [(1e-9, 1), (1e9, 1)]])
@pytest.mark.parametrize("x_log", [False, True])
def test_odd_points_draw_too(points, x_log, checked):
    html = draw(points, x_log=x_log)
    assert html == "" or checked(html).tags[0] == "figure"


def test_a_chart_without_points_is_nothing():
    assert draw([]) == ""


def test_long_series_are_thinned_to_what_a_screen_shows():
    assert len(draw([(n, n) for n in range(100_000)])) < 20_000


def test_steps_hold_their_value_until_the_next():
    html = chart("t", [Series("s", [(0, 0), (1, 1)], 2, steps=True)], x=str, y=str)
    line = next(p for p in svg(html).iter("path") if p.get("class") == "line tone2")
    assert line.get("d").count("L") == 2


def test_what_an_endpoint_says_cannot_become_markup(checked):
    evil = "</td><script>alert(1)</script>"
    html = frame.page(
        evil,
        [
            frame.hero([(evil, False)], evil, evil, evil),
            frame.tiles([(evil, evil, evil)]),
            frame.table(evil, [evil], [[evil]], note=evil),
            frame.facts(evil, [(evil, evil)]),
        ],
    )
    checked(html)


def test_a_table_without_rows_is_nothing():
    assert frame.table("t", ["a"], []) == ""
