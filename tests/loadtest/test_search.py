from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from loadtest.api import Endpoint
from loadtest.errors import OptionError
from loadtest.files import encode
from loadtest.mdc import Queue
from loadtest.probing import Bounds, search, sweep
from loadtest.search import Probe, Search, Trial, crossing
from loadtest.search_html import page
from loadtest.server import Behaviour, Server
from loadtest.sizes import Sizes
from loadtest.slo import Slo, SloClass, parse
from loadtest.spec import Spec

# What real time shows, a machine whose cores are taken cannot: it gets further tries.
REAL_TIME = pytest.mark.flaky(reruns=4, reruns_delay=1)


def probe(rate: float, share: float, count: int = 1000) -> Probe:
    return Probe(rate, count, share, share, share, share >= 0.9, True)


@pytest.mark.parametrize(
    ("queue", "limit"), [(Queue(1, 0.1), 0.2), (Queue(4, 0.1), 0.05), (Queue(4, 0.1), 0.25)]
)
def test_the_solved_queue_is_the_simulated_queue(queue, limit):
    capacity = queue.capacity(limit, 0.9)
    waits = list(itertools.islice(queue.waits(capacity, random.Random(1)), 1000, 151_000))
    assert sum(wait <= limit for wait in waits) / len(waits) == pytest.approx(0.9, abs=0.01)


def test_a_queue_of_one_server_is_the_textbooks():
    """M/D/1: P(no wait) = 1 - load; from saturation on nobody is served in time."""
    assert Queue(1, 0.1).waits_at_most(0.0, 6.0) == pytest.approx(0.4, abs=1e-6)
    assert Queue(1, 0.1).waits_at_most(0.5, 10.0) == 0.0


@pytest.mark.parametrize(("queue", "limit"), [(Queue(4, 0.1), 0.25), (Queue(1, 0.1), 0.2)])
def test_a_search_recovers_the_capacity_of_a_queue(queue, limit):
    """Ten trials of each; bench/loadtest_figures.py does hundreds."""
    capacity = queue.capacity(limit, 0.9)
    for seed in range(10):
        rng = random.Random(seed)
        hunt = Search(0.9, capacity / 2 ** rng.uniform(1, 6))
        while (rate := hunt.next_rate()) is not None:
            trial = Trial(0.9, least=3000, most=30_000)
            next(wait for wait in queue.waits(rate, rng) if trial.add(wait <= limit))
            hunt.tell(trial.probe(rate))
        assert len(hunt.probes) <= 12
        assert hunt.capacity == pytest.approx(capacity, rel=0.05)


def test_a_trial_ends_as_soon_as_it_is_sure_and_not_before():
    sure, unsure = Trial(0.9, least=100), Trial(0.9, least=100, most=2000)
    ends = [sure.add(True) for _ in range(100)]
    assert (ends[:99], ends[99]) == ([False] * 99, True)
    assert sure.probe(1).held
    assert sure.probe(1).decided
    count = next(n for n in itertools.count(1) if unsure.add(n % 10 != 0))
    assert count == 2000
    assert not unsure.probe(1).decided


@pytest.mark.parametrize(("share", "error"), [(0.93, 0.05), (0.87, 0.05)])
def test_looking_often_does_not_make_a_trial_err_more(share, error):
    rng = random.Random(1)
    wrong = 0
    for _ in range(200):
        trial = Trial(0.9, least=50, most=5000)
        next(None for _ in itertools.count() if trial.add(rng.random() < share))
        found = trial.probe(1)
        wrong += found.decided and found.held != (share > 0.9)
    assert wrong <= 2 * error * 200


def test_rates_double_until_one_fails_and_are_then_bisected():
    hunt, tried = Search(0.9, 1.0), []
    while (rate := hunt.next_rate()) is not None:
        tried.append(round(rate, 2))
        hunt.tell(probe(rate, 0.99 if rate <= 5 else 0.5))
    assert tried == [1, 2, 4, 8, 5.66, 4.76, 5.19, 4.97]
    assert (round(hunt.held, 2), round(hunt.failed, 2)) == (4.97, 5.19)


def test_rates_halve_when_even_the_first_fails():
    hunt = Search(0.9, 8.0, most_probes=3)
    while (rate := hunt.next_rate()) is not None:
        hunt.tell(probe(rate, 0.5))
    assert [p.rate for p in hunt.probes] == [8, 4, 2]
    assert hunt.capacity is None


def test_the_crossing_lies_between_the_nearest_probes():
    assert crossing([probe(8, 0.5), probe(1, 1.0), probe(4, 0.95)], 0.9) == pytest.approx(
        5, abs=0.5
    )
    assert crossing([probe(1, 1.0), probe(4, 0.95)], 0.9) == 4
    assert crossing([probe(4, 0.9), probe(8, 0.1)], 0.9) == pytest.approx(4, rel=0.01)
    assert crossing([probe(4, 0.2)], 0.9) is None


def spec_of(port: int, slo: str) -> Spec:
    return Spec(
        endpoint=Endpoint(f"http://127.0.0.1:{port}", "known", api_key="secret"),
        classes=[SloClass("all", parse(slo))],
        input=Sizes(1, 1),
        output=Sizes(1, 1),
    )


@pytest.mark.asyncio
@REAL_TIME
async def test_a_search_finds_a_real_servers_knee_and_leaves_it_idle(checked):
    """Two slots of 20 ms saturate at 100/s; the bounds are wide, since tests share their cores."""
    async with Server(Behaviour(ttft=0.02, itl=0, slots=2)) as server:
        bounds = Bounds(least=60, most=150, seconds=2, tolerance=0.5)
        spec = spec_of(server.port, "ttft=200ms,tpot=1s")
        told = []
        report = await search(spec, 40, bounds, told.append)
    assert told == report.measured
    assert 20 < report.capacity < 140
    assert report.held < report.failed
    first = report.measured[0]
    assert [scale for scale, _ in first.scales] == sorted(scale for scale, _ in first.scales)
    assert b"secret" not in encode(report)
    html = page(report)
    assert checked(html).tags.count("svg") == 2
    assert "highest rate" in html


@pytest.mark.asyncio
async def test_an_overloaded_probe_ends_by_its_deadlines_not_by_its_answers():
    """Each answer takes a minute; the trial knows after the SLO's 0.1 s that it was missed."""
    async with Server(Behaviour(ttft=60, itl=0)) as server:
        spec = spec_of(server.port, "ttft=100ms,tpot=100ms")
        report = await sweep(spec, [200], Bounds(least=50, most=200), lambda _: None)
    (measured,) = report.measured
    assert not measured.probe.held
    assert report.capacity is None


@pytest.mark.asyncio
async def test_mlperfs_rule_fails_when_one_percentile_does():
    async with Server(Behaviour(ttft=0.01, itl=0.02)) as server:
        spec = msgspec.structs.replace(
            spec_of(server.port, "ttft=500ms,tpot=5ms,share=0.9,rule=each"), output=Sizes(3, 3)
        )
        report = await sweep(spec, [100], Bounds(least=50, most=100), lambda _: None)
    assert report.measured[0].probe.share == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 3, "requests": 3},
        {"turns": 2},
        {"classes": [SloClass("all", Slo(tpot=0.1, rule="mean"))]},
    ],
)
async def test_what_has_no_rate_or_no_share_cannot_be_searched(changes):
    spec = msgspec.structs.replace(spec_of(1, "ttft=1s"), **changes)
    with pytest.raises(OptionError, match="--"):
        await search(spec, 1, Bounds(), lambda _: None)
