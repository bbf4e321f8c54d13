"""A day with machines that come and go: the bill, the clock, and what becomes of requests."""

from __future__ import annotations

import io
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from motley import main
from scheduler.autoscale_policies import Foresight, RatePlan, RateTable, Static, Threshold
from scheduler.autoscale_table import shown
from scheduler.compare_day import FORESIGHT, OURS, STATIC, THRESHOLD, Comparison
from scheduler.errors import SetupError
from scheduler.machines import Machines, Span, whole_time
from scheduler.plan import Plan
from scheduler.planner_columns import build
from scheduler.rate_curve import DAY_S, Curve, built_in, draw, read_curves
from scheduler.service_file import parse_service
from scheduler.simulate_day import Day
from scheduler.switching import Step
from scheduler.workload import Arrival

SERVICE = """
[slo]
ttft_ms = 2000
tpot_ms = 100
[[model]]
name = "llama-3.1-8b"
rate = 4
sizes = [{input = 1000, output = 60, weight = 1.0}]
[plan]
gpus = ["A10G"]
tp = [1]
roles = ["mixed"]
[[offer]]
gpu = "A10G"
price = 1.0
date = 2026-11-01
source = "a round number"
"""
MODEL = "llama-3.1-8b"
COLUMN = "llama-3.1-8b mixed A10G x1"


@pytest.fixture(scope="module")
def service():
    return parse_service(SERVICE, Path())


@pytest.fixture(scope="module")
def built(service):
    return build(service)


@pytest.fixture
def machines(service, built):
    columns = {column.name: column for column in built.problem.columns}
    return Machines(service.autoscale, columns, {COLUMN: 1})


def start(name):
    return (Step("start", name, COLUMN),)


def leave(name):
    return (Step("drain", name, COLUMN),), (Step("stop", name, COLUMN),)


# ── machines ────────────────────────────────────────────────────────────────────────────────────


def test_a_machine_is_ready_after_its_start_and_paid_from_its_rent(machines):
    machines.carry_out((start("new"),))
    assert machines.advance(300.0) == [
        Span(0.0, 180.0, {COLUMN: 1}),
        Span(180.0, 300.0, {COLUMN: 2}),
    ]
    assert machines.dollars == pytest.approx(2 * 300 / 3600)
    assert machines.switches == {"start": 1}


def test_the_next_stage_waits_for_the_last_and_who_drains_is_paid_until_it_is_empty(machines):
    machines.carry_out((start("new"), *leave(f"{COLUMN} #0")))
    assert [(span.end, span.ready) for span in machines.advance(600.0)] == [
        (600.0, {COLUMN: 1}),
    ]
    assert machines.dollars == pytest.approx((600 + 180 + 60) / 3600)
    assert machines.switches == {"start": 1, "stop": 1}
    assert [worker.name for worker in machines.running] == ["new"]


def test_a_new_decision_replaces_what_has_not_begun(machines):
    machines.carry_out((start("new"), *leave(f"{COLUMN} #0")))
    machines.advance(100.0)
    machines.carry_out(())
    machines.advance(900.0)
    assert machines.ready == {COLUMN: 2}


def test_who_is_stopped_before_it_is_ready_never_serves(machines):
    machines.carry_out((start("new"),))
    machines.advance(100.0)
    machines.carry_out(((Step("stop", "new", COLUMN),),))
    assert machines.advance(300.0) == [Span(100.0, 300.0, {COLUMN: 1})]


def test_a_flip_is_away_for_its_time_and_keeps_the_machine(service):
    both = build(parse_service(SERVICE.replace('"mixed"', '"prefill", "decode"'), Path()))
    columns = {column.name: column for column in both.problem.columns}
    prefill, decode = sorted(columns, reverse=True)
    machines = Machines(service.autoscale, columns, {prefill: 2})
    machines.carry_out(((Step("flip", f"{prefill} #0", decode),),))
    assert machines.advance(60.0) == [
        Span(0.0, 10.0, {prefill: 1}),
        Span(10.0, 60.0, {decode: 1, prefill: 1}),
    ]
    assert machines.switches == {"flip": 1}


def test_only_who_was_ready_all_the_time_served_the_window():
    spans = [Span(0, 1, {"a": 2, "b": 1}), Span(1, 2, {"a": 3})]
    assert whole_time(spans) == {"a": 2}


# ── curves ──────────────────────────────────────────────────────────────────────────────────────


def test_requests_follow_the_curve():
    curve = Curve((0.0, 1000.0, 2000.0), (0.0, 20.0, 0.0))
    times = [a.at for a in draw([Arrival(0.0, 5, 5)], curve, 1.0, np.random.default_rng(0))]
    counts, _ = np.histogram(times, bins=4, range=(0, 2000))
    assert counts == pytest.approx([2500, 7500, 7500, 2500], rel=0.07)
    assert times == sorted(times)


def test_gaps_are_as_uneven_as_they_are_asked_to_be():
    curve = Curve((0.0, 4000.0), (5.0, 5.0))
    for cv in (0.5, 1.0, 3.0):
        drawn = draw([Arrival(0.0, 5, 5)], curve, cv, np.random.default_rng(1))
        gaps = np.diff([a.at for a in drawn])
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_the_built_in_day_has_its_peak_three_times_its_trough_and_a_burst_on_the_last_evening():
    curve = built_in(2, np.random.default_rng(0))
    hours = np.interp(np.arange(48) * 3600.0, curve.times, curve.rates)
    assert 2.3 < hours[:24].max() / hours[:24].min() < 4
    assert hours[44] > 1.25 * hours[43]
    assert curve.times[-1] == 2 * DAY_S


def test_files_of_rates_are_summed_and_cut(tmp_path):
    (tmp_path / "a.csv").write_text("seconds,rate\n0,1\n600,3,more\n1200,2\n")
    (tmp_path / "b.csv").write_text("0,1\n600,1\n1200,0\n")
    curve = read_curves([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert curve == Curve((0.0, 600.0, 1200.0), (2.0, 4.0, 2.0))
    assert curve.cut(300.0, 900.0) == Curve((0.0, 300.0, 600.0), (3.0, 4.0, 3.0))
    assert curve.scaled(6.0).mean == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1\n60,-1\n", "line 2"),
        ("0,1\n60,x\n", "line 2"),
        ("0,1\n", "fewer"),
        ("0,0\n9,0\n", "fewer"),
    ],
)
def test_rates_that_cannot_be_meant_are_named(tmp_path, text, said):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SetupError, match=said):
        read_curves([tmp_path / "bad.csv"])


# ── a day ───────────────────────────────────────────────────────────────────────────────────────


def planned(count):
    return RatePlan(Plan("optimal", count, {COLUMN: count}, {}, {}, 0.0, 0.0), None)


STILL = Static(planned(1), 300.0)


def hour(service, built, *rates):
    """So many requests/s, each for an equal part of an hour."""
    edges = np.linspace(0, 3600, len(rates) + 1)
    times = [t for first, last in pairwise(edges) for t in (first, last - 1)]
    curve = Curve(tuple(times), tuple(rate for rate in rates for _ in range(2)))
    sizes = [Arrival(0.0, 1000, 60)]
    return Day(service, built, {MODEL: draw(sizes, curve, 1.0, np.random.default_rng(0))}, 3600.0)


def test_what_never_changes_costs_its_price_and_one_overloaded_half_shows(service, built):
    report = hour(service, built, 1, 15).run(STILL, {COLUMN: 2})
    assert (report.dollars, report.gpu_hours) == (pytest.approx(2.0), pytest.approx(2.0))
    assert report.switches == {}
    calm, busy = report.windows[:6], report.windows[6:]
    assert min(window.attainment for window in calm) > 0.95
    assert max(window.attainment for window in busy) < 0.5
    assert report.attainment == pytest.approx(
        sum(w.attainment * w.rate for w in report.windows) / sum(w.rate for w in report.windows)
    )


def test_requests_that_wait_at_the_end_of_a_window_wait_at_the_beginning_of_the_next(
    service, built
):
    flooded = [Arrival(float(at) / 100, 1000, 60) for at in range(29_900, 30_000)]
    later = [Arrival(300.0 + at, 1000, 60) for at in range(0, 60, 5)]
    alone = Day(service, built, {MODEL: later}, 600.0).run(STILL, {COLUMN: 1})
    after = Day(service, built, {MODEL: flooded + later}, 600.0).run(STILL, {COLUMN: 1})
    assert alone.windows[1].attainment == 1.0
    assert after.windows[1].attainment < 1.0


def test_foresight_pays_for_each_window_what_it_needs(service, built):
    day = hour(service, built, 2, 6)
    plans = [planned(1)] * 6 + [planned(3)] * 6
    report = day.run(Foresight(plans, built, 300.0), {COLUMN: 1}, at_once=True)
    assert report.dollars == pytest.approx(0.5 * 1 + 0.5 * 3)
    assert report.switches == {"start": 2}


def test_the_threshold_is_the_formula_of_kubernetes(service, built):
    peak = RateTable(service, time.perf_counter).plan({MODEL: 6.0})
    threshold = Threshold(built, peak.plan, 0.5)
    day = hour(service, built, 2, 6)
    report = day.run(threshold, {COLUMN: 1})
    capacity = built.problem.columns[0].capacity["1000/60"]
    assert report.attainment > 0.5
    for at in (25, 55):
        wanted = report.windows[at].rate / capacity / 0.5
        assert wanted * 0.85 <= report.windows[at].ready[COLUMN] <= wanted * 1.15 + 1


def test_plans_of_like_rates_are_made_once(service):
    table = RateTable(service, time.perf_counter)
    assert table.plan({MODEL: 4.0}) is table.plan({MODEL: 4.01})
    assert table.plan({MODEL: 8.0}).plan.cost > table.plan({MODEL: 4.0}).plan.cost


# ── the command ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Two hours, of which the first is history; for a sixth of the second, three times the load."""
    folder = tmp_path_factory.mktemp("autoscale")
    (folder / "service.toml").write_text(SERVICE + "[autoscale]\nhold_s = 600\n")
    rates = [2.0] * 15 + [6.0] * 2 + [2.0] * 8
    (folder / "rates.csv").write_text("".join(f"{300 * n},{r}\n" for n, r in enumerate(rates)))
    words = ["--rates", f"{folder / 'rates.csv'}", "--from-hour", "1", "--hours", "1"]
    return ["autoscale", f"{folder / 'service.toml'}", *words, "--rate", "2.5"]


def test_the_command_compares_the_policies(asked, capsys, tmp_path):
    assert main([*asked, "--json", "--picture", f"{tmp_path / 'day.svg'}"]) == 0
    answer = msgspec.json.decode(capsys.readouterr().out, type=Comparison)
    days = answer.days
    assert list(days) == [OURS, FORESIGHT, THRESHOLD, STATIC]
    assert days[FORESIGHT].dollars <= days[OURS].dollars < days[STATIC].dollars
    assert days[OURS].attainment >= answer.share
    assert sum(days[OURS].switches.values()) < sum(days[THRESHOLD].switches.values())
    assert answer.changes[0].reason.endswith("more than what runs serves")
    assert 0 < answer.forecasts[MODEL].error < 0.5
    picture = (tmp_path / "day.svg").read_text()
    assert picture.startswith("<svg")
    assert picture.count('class="line ') == 8
    assert picture.count('class="change"') == len(answer.changes)
    console = Console(width=200, record=True, file=io.StringIO())
    for each in shown(answer, decisions=True):
        console.print(each)
    said = console.export_text()
    for word in (*days, "forecasts were off by", answer.changes[0].reason, "start"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "0"], "--rate"),
        (["--from-hour", "9"], "hours 0 to 2"),
        (["--burstiness", "nan"], "--burstiness"),
    ],
)
def test_the_command_names_what_must_change(asked, capsys, words, said):
    assert main([*asked, *words]) == 2
    assert said in capsys.readouterr().err
