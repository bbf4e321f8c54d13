"""Curves of cost: planned point by point, never rising as less is asked for, drawn as they are."""

from __future__ import annotations

import json
import math
import re
import shutil
from xml.etree import ElementTree

import msgspec
import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from motley import main
from scheduler import pareto, pareto_command, pareto_svg
from scheduler.certify import Certificate
from scheduler.pareto import Certified, Curve, Point
from scheduler.pareto_page import page
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.service_file import read_service
from scheduler.simulate_report import Interval

SERVICE = """
slo = {ttft_ms = 1000, tpot_ms = 60, share = 0.9}
plan = {gpus = ["L4", "A10G"], tp = [1], gap = 0.01}
[[model]]
name = "llama-3.1-8b"
rate = 10
sizes = [{input = 500, output = 100, weight = 1}]
"""
SECOND = """
[[model]]
name = "<b>"
shape = "llama-3.1-8b"
rate = 2
slo = {ttft_ms = 500, tpot_ms = 60, share = 0.99}
sizes = [{input = 500, output = 100, weight = 1}]
"""


def clock():
    return 0.0


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "service.toml"
    path.write_text(SERVICE)
    return path


def planned(path):
    service = read_service(path)
    built = build(service)
    return service, built, make_plan(built.problem, built.options, clock)


def curves_of(path, certificate=None, certify=None):
    return pareto_command.run(*planned(path), certificate, certify)


def point(factor: float, cost: float, shed: float = 0.0, sure: Certified | None = None) -> Point:
    return Point(factor, 1000 * factor, cost, {"L4": cost}, {"m L4": 1}, shed, 0.0, sure)


# ── planning ────────────────────────────────────────────────────────────────────────────────────


def test_what_asks_for_less_never_costs_more_and_the_service_itself_is_on_every_curve(path):
    _, _, plan = planned(path)
    found = curves_of(path)
    assert [curve.name for curve in found] == ["attainment", "TTFT", "TPOT", "rate"]
    for curve in found:
        served = [each.cost for each in curve.points if not each.shed]
        assert served == sorted(served, reverse=True)
        assert curve.asked.cost == plan.cost
        assert curve.points[0].cost > curve.points[-1].cost or curve.points[0].shed
        for each in curve.points:
            assert sum(each.by_gpu.values()) == pytest.approx(each.cost)


def test_points_are_known_by_what_they_ask_for(path):
    values = {curve.name: (curve.unit, curve.points) for curve in curves_of(path)}
    for name, unit, asked, first in (
        ("attainment", "share", 0.9, 0.999),
        ("TTFT", "ms", 1000, 250),
        ("TPOT", "ms", 60, 15),
        ("rate", "requests/s", 10, 40),
    ):
        found, points = values[name]
        assert found == unit
        assert points[0].value == pytest.approx(first)
        assert next(each for each in points if each.factor == 1).value == pytest.approx(asked)


def test_models_that_ask_for_unlike_limits_are_known_by_factors(path):
    path.write_text(SERVICE + SECOND)
    service = read_service(path)
    units = {
        axis.name: pareto.curve(service, axis, [point(1.0, 1.0)]).unit
        for axis in pareto.axes(service)
    }
    assert units == {"attainment": "×", "TTFT": "×", "TPOT": "ms", "rate": "requests/s"}


def test_no_more_than_half_may_miss(path):
    path.write_text(SERVICE.replace("share = 0.9", "share = 0.8"))
    tried = [task for task in pareto.tasks(read_service(path)) if task.axis.name == "attainment"]
    assert min(task.service.demands[0].slo.share for task in tried) >= 0.5


def test_a_plan_for_more_is_the_plan_for_less_where_that_found_a_dearer_one(path):
    service = read_service(path)
    axis = pareto.axes(service)[1]
    holds = Certified(True, 9.0, {"m L4": 2}, 0.95)
    dearer = Certified(True, 11.0, {"m L4": 3}, 0.97)
    drawn = [point(0.5, 8.0, sure=holds), point(1.0, 8.5, sure=dearer), point(2.0, 7.0)]
    found = pareto.curve(service, axis, drawn).points
    assert [each.cost for each in found] == [8.0, 8.0, 7.0]
    assert [each.certified for each in found] == [holds, holds, None]


def test_a_plan_that_serves_fewer_is_no_plan_for_less(path):
    service = read_service(path)
    drawn = [point(0.5, 5.0, shed=0.3), point(1.0, 8.0)]
    found = pareto.curve(service, pareto.axes(service)[1], drawn).points
    assert [(each.cost, each.shed) for each in found] == [(5.0, 0.3), (8.0, 0.0)]


def test_with_a_certificate_the_nearest_points_are_certified_too(path):
    service, built, plan = planned(path)
    asked = []

    def certify(service, built, plan):
        asked.append(service)
        held = Interval(0.96, 0.95, 0.97, 5)
        return plan, Certificate(True, {"llama-3.1-8b": {"poisson": held}}, 0.0, 1, 0.0)

    found = pareto_command.run(service, built, plan, certify(service, built, plan), certify)
    assert len(asked) == 1 + len(pareto.tasks(service)) - sum(
        1 for curve in found for each in curve.points if each.shed
    )
    for curve in found:
        assert curve.asked.certified == Certified(True, plan.cost, plan.replicas, 0.96)
    near = asked[1].demands[0]
    wanted = service.demands[0]
    factors = [near.slo.ttft_ms / wanted.slo.ttft_ms, near.slo.tpot_ms / wanted.slo.tpot_ms]
    assert max(abs(math.log(factor)) for factor in factors) < 0.4


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────

CURVES = (
    Curve("TTFT", "ms", "m", (point(0.5, 8.0), point(1.0, 7.0, shed=0.0004), point(2.0, 6.0))),
    Curve("rate", "requests/s", "m", (point(2.0, 9.0), point(1.0, 7.0))),
)


def test_a_sheet_is_svg_with_an_area_for_each_plan_and_words_for_each_point():
    sheet = pareto_svg.sheet("<m>", [(curve.name, curve) for curve in CURVES], ["L4"])
    root = ElementTree.fromstring(sheet)
    rects = [each for each in root.iter() if each.tag.endswith("rect")]
    areas = [each for each in rects if len(each)]
    assert len(areas) == 5
    assert ["part" in each.get("class") for each in areas].count(True) == 1
    said = [each.text for each in root.iter() if each.tag.endswith("title")]
    assert "TTFT 500 ms: 8.00 $/h: 1 × L4" in said


def test_what_is_not_served_is_never_rounded_away():
    assert pareto_svg.served(CURVES[0].points[1]) == "99.9 % served"


def test_a_taller_area_is_a_dearer_plan_and_a_limit_stands_left_of_a_looser_one():
    root = ElementTree.fromstring(f"<svg>{pareto_svg.panel(CURVES[0], ['L4'])}</svg>")
    areas = [each for each in root.iter("rect") if len(each)]
    heights = [float(each.get("height")) for each in areas]
    lefts = [float(each.get("x")) for each in areas]
    assert heights[0] / heights[2] == pytest.approx(8 / 6, rel=0.01)
    assert lefts == sorted(lefts)


def test_a_page_fetches_nothing_and_its_words_are_only_words():
    html = page("<script>", CURVES, [("price", "1 & 2")])
    assert "<script" not in html
    assert "1 &amp; 2" in html
    assert not re.search(r"(src|href|url\()\s*=?", html)


# ── as it is typed ──────────────────────────────────────────────────────────────────────────────


def test_the_command_draws_and_tells(path, tmp_path, capfd):
    files = [tmp_path / "cost.html", tmp_path / "cost.svg"]
    options = [part for file in files for part in ("--pareto", str(file))]
    assert main(["plan", str(path), "--no-certify", "--json", *options]) == 0
    answer = json.loads(capfd.readouterr().out)
    curves = msgspec.convert(answer["pareto"], tuple[Curve, ...])
    assert curves[0].asked.cost == pytest.approx(answer["cost"])
    assert files[0].read_text().startswith("<!doctype html>")
    assert ElementTree.parse(files[1]).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("name", "said"),
    [("cost.pdf", "ends in .html, .svg, .png"), ("no/cost.svg", "there is no folder")],
)
def test_a_file_that_cannot_be_drawn_is_named_before_any_work(path, tmp_path, capfd, name, said):
    assert main(["plan", str(path), "--pareto", str(tmp_path / name)]) == 2
    assert said in capfd.readouterr().err


def test_only_a_service_is_drawn(tmp_path, capfd):
    assert main(["plan", "--problem", "p.json", "--pareto", str(tmp_path / "c.svg")]) == 2
    assert "SERVICE.toml" in capfd.readouterr().err


@pytest.mark.skipif(
    not (shutil.which("rsvg-convert") or shutil.which("chromium")), reason="nothing here draws PNG"
)
def test_png_is_the_sheet_at_twice_its_size(path, tmp_path):
    file = tmp_path / "cost.png"
    pareto_command.write([file], read_service(path), CURVES, 0.0)
    header = file.read_bytes()[:24]
    size = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert size == tuple(2 * math.ceil(each) for each in pareto_svg.size(2))
