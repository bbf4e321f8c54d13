from __future__ import annotations

import random

import msgspec
import pytest

from loadtest.api import Endpoint
from loadtest.arrivals import Arrivals
from loadtest.compare import compare, read_report
from loadtest.errors import OptionError
from loadtest.files import encode
from loadtest.histogram import Histogram
from loadtest.measure import Run
from loadtest.outcome import Outcome
from loadtest.report import build
from loadtest.report_html import page
from loadtest.run import Part
from loadtest.slo import Slo, SloClass
from loadtest.spec import Spec
from loadtest.tally import Gaps
from loadtest.workload import Workload


def report_of(seed: int, *, slower: float = 1.0, lag: float = 0.0, cpu: float = 1.0, **changes):
    """400 requests at 100/s whose luck changes every 20, with a TTFT of some 100 ms."""
    spec = Spec(
        endpoint=Endpoint("http://127.0.0.1:1", "m", api_key="secret"),
        classes=[SloClass("all", Slo(ttft=0.15, tpot=0.1))],
        arrivals=Arrivals("constant", rate=100),
        requests=400,
    )
    spec = msgspec.structs.replace(spec, **changes)
    rng, outcomes, luck = random.Random(seed), [], 1.0
    for n in range(400):
        if n % 20 == 0:
            luck = rng.uniform(0.8, 1.2)
        at, ttft = n / 100, 0.1 * luck * slower * rng.uniform(0.9, 1.1)
        first, last = at + ttft, at + ttft + 0.15
        outcomes.append(
            Outcome(
                n,
                n % len(spec.classes),
                at,
                at + lag,
                last,
                first,
                last,
                chunks=16,
                tokens=16,
                prompt_tokens=64,
                cached_tokens=16,
            )
        )
    gaps = Gaps(Histogram({}), Histogram({}))
    gaps.chunk.add(0.01, 6000)
    gaps.token.add(0.01, 6000)
    return build(Run(spec, Workload(spec), outcomes, [Part(cpu, 4.0, 50_000_000, gaps)], 0.0), 3.6)


def test_two_runs_of_the_same_are_the_same_and_a_slower_one_is_worse():
    a = report_of(1)
    same = compare(a, report_of(2))
    assert {line.verdict for line in same.lines} == {"same"}
    worse = compare(a, report_of(2, slower=1.3))
    verdicts = {line.name: line.verdict for line in worse.lines}
    assert verdicts["TTFT p50"] == verdicts["attainment"] == "worse"
    assert verdicts["TPOT p50"] == "same"
    assert worse.worse
    better = compare(report_of(2, slower=1.3), a)
    assert {line.name: line.verdict for line in better.lines}["TTFT p50"] == "better"
    assert not better.worse


def test_runs_of_the_same_are_rarely_called_different():
    found = [compare(report_of(s), report_of(s + 1)) for s in range(100, 106, 2)]
    medians = [
        line.verdict != "same"
        for result in found
        for line in result.lines
        if line.name == "TTFT p50"
    ]
    assert sum(medians) == 0


def test_what_makes_two_runs_unlike_is_said():
    found = compare(report_of(1), report_of(1, arrivals=Arrivals("constant", 99)))
    assert [warning.split()[1] for warning in found.warnings] == ["loads"]
    assert compare(report_of(1), report_of(1, lag=0.02)).warnings == ["B is INVALID"]


def test_a_report_survives_its_file_and_keeps_no_key(tmp_path):
    report, path = report_of(1), tmp_path / "a.json"
    path.write_bytes(encode(report))
    assert read_report(path) == report
    assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize("text", ["", "{}", '{"schema":"motley.loadtest.run/2"}'])
def test_a_file_that_is_no_report_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"a\.json"):
        read_report(path)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"lag": 0.0049}, []),
        ({"lag": 0.0051}, ["schedule lag, p99"]),
        ({"cpu": 2.9}, ["the client's CPU, share of a core"]),
        ({"lag": 0.002, "classes": [SloClass("a", Slo(ttft=0.015))]}, ["schedule lag, p99"]),
    ],
)
def test_a_late_or_busy_client_makes_the_run_invalid(changes, broken):
    report = report_of(1, **changes)
    assert [check.name for check in report.checks if not check.ok] == broken
    assert report.valid == (not broken)


def test_totals_count_all_that_was_scheduled():
    totals = report_of(1).totals
    assert (totals.scheduled, totals.answered) == (400, 400)
    assert totals.asked_rate == pytest.approx(100)
    assert totals.prefix_hit_share == 0.25
    assert totals.output_tokens == 6400
    assert totals.cost_per_million_output == pytest.approx(3.6 / 3600 * 3.99 / 6400 * 1e6)
    assert totals.cost_per_million_met > totals.cost_per_million_output * 0.99


def test_attainment_is_by_class_and_by_the_rule():
    classes = [
        SloClass("loose", Slo(ttft=1, tpot=1)),
        SloClass("tight", Slo(ttft=0.05, tpot=1)),
        SloClass("each", Slo(ttft=1, tpot=0.005, rule="each")),
        SloClass("mean", Slo(ttft=0.11, rule="mean")),
    ]
    report = report_of(1, classes=classes)
    assert [(g.name, g.attained) for g in report.classes] == [
        ("loose", True),
        ("tight", False),
        ("each", False),
        ("mean", True),
    ]
    assert [g.scheduled for g in report.classes] == [100] * 4
    assert not report.attained


def test_the_slo_scale_sweep_ascends_through_the_attainment():
    report = report_of(1)
    shares = [share for _, share in report.scales]
    assert shares == sorted(shares)
    assert dict(report.scales)[1.0] == report.share


def test_the_page_of_a_run_is_whole_and_needs_nothing_else(checked):
    html = page(report_of(1))
    assert checked(html).tags.count("svg") == 6
    assert all(word in html for word in ("VALID", "SLO MET", "TTFT SLO", "per million output"))
    invalid = page(report_of(1, lag=0.1, classes=[SloClass("a", Slo(ttft=0.01))]))
    assert all(word in invalid for word in ("INVALID", "SLO MISSED", "Do not use these figures"))


def test_the_timeline_holds_every_request():
    windows = report_of(1).timeline
    assert sum(window.scheduled for window in windows) == 400
    assert all(window.width == windows[0].width for window in windows)
