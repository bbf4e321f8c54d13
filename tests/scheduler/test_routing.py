"""Routing: which worker takes a request, given what each measured of itself and holds now."""

from __future__ import annotations

import pytest

from scheduler.errors import Unavailable
from scheduler.messages import Address, Peer, Rates, Role
from scheduler.routing import MAX_WAIT_S, Route, WorkerView, choose

FAST, SLOW = Rates(1000.0, 0.01), Rates(100.0, 0.1)


def worker(name: str, role: Role, rates: Rates = FAST, **load) -> WorkerView:
    return WorkerView(name, role, Address(f"host-{name}", 1), rates, **load)


def peer(name: str) -> Peer:
    return Peer(name, Address(f"host-{name}", 1))


P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED

TABLE = {
    "one of each role: prefill and decode apart": (
        [worker("p", P), worker("d", D)],
        Route("p", peer("d")),
    ),
    "a mixed worker alone does all": ([worker("m", M)], Route("m")),
    "the faster prefill": (
        [worker("p", P, SLOW), worker("q", P), worker("d", D)],
        Route("q", peer("d")),
    ),
    "the slower prefill when the faster one's queue is long": (
        [worker("p", P, SLOW), worker("q", P, queued_tokens=2000), worker("d", D)],
        Route("p", peer("d")),
    ),
    "the faster decode": (
        [worker("p", P), worker("d", D, SLOW), worker("e", D)],
        Route("p", peer("e")),
    ),
    "the less busy decode": (
        [worker("p", P), worker("d", D, running=3), worker("e", D, running=2)],
        Route("p", peer("e")),
    ),
    "a slow decode before a fast one that is very busy": (
        [worker("p", P), worker("d", D, SLOW), worker("e", D, running=50)],
        Route("p", peer("d")),
    ),
    "split against whole: a faster pair wins": (
        [worker("p", P), worker("d", D), worker("m", M, SLOW)],
        Route("p", peer("d")),
    ),
    "split against whole: a free mixed worker beats a queue": (
        [worker("p", P, queued_tokens=500), worker("d", D), worker("m", M)],
        Route("m"),
    ),
    "room for the whole request before speed": (
        [worker("p", P), worker("d", D, kv_tokens=100), worker("e", D, SLOW, kv_tokens=4000)],
        Route("p", peer("e")),
    ),
    "too little room everywhere: the worker itself will say so": (
        [worker("p", P), worker("d", D, kv_tokens=50), worker("e", D, SLOW, kv_tokens=60)],
        Route("p", peer("d")),
    ),
    "equals: by name, so that two routers agree": (
        [worker("b", M), worker("a", M)],
        Route("a"),
    ),
    "a draining worker gets nothing": (
        [worker("m", M, draining=True), worker("n", M, SLOW)],
        Route("n"),
    ),
    "degraded: only a decode worker is left": ([worker("d", D)], Route("d", degraded=True)),
    "degraded: only a prefill worker is left": ([worker("p", P)], Route("p", degraded=True)),
}


@pytest.mark.parametrize(("workers", "route"), TABLE.values(), ids=TABLE)
def test_choose(workers, route):
    assert choose(100, 50, workers) == route


@pytest.mark.parametrize(
    ("avoid", "route"),
    [
        ({"p"}, Route("q", peer("d"))),
        ({"p", "q"}, Route("d", degraded=True)),
        ({"d"}, Route("p", degraded=True)),
        ({"p", "q", "d"}, Route("p", peer("d"))),
    ],
    ids=["one prefill", "all prefill", "the decode", "everybody: better than nobody"],
)
def test_workers_that_failed_the_request_are_avoided(avoid, route):
    workers = [worker("p", P), worker("q", P, SLOW), worker("d", D)]
    assert choose(100, 50, workers, frozenset(avoid)) == route


@pytest.mark.parametrize(
    ("workers", "route"),
    [
        ([worker("p", P), worker("d", D)], Route("d")),
        ([worker("p", P), worker("d", D, SLOW), worker("m", M)], Route("m")),
        ([worker("p", P)], Route("p", degraded=True)),
    ],
    ids=["the decode worker computes the prompt too", "or a mixed one", "or whoever is there"],
)
def test_after_a_failed_hand_over_the_request_stays_on_one_worker(workers, route):
    assert choose(100, 50, workers, split=False) == route


@pytest.mark.parametrize("workers", [[], [worker("m", M, draining=True)]], ids=["none", "draining"])
def test_nobody_is_there(workers):
    with pytest.raises(Unavailable) as refused:
        choose(100, 50, workers)
    assert (refused.value.status, refused.value.retry_after) == (503, 2)


def test_a_queue_that_is_too_long_is_refused_with_the_time_until_it_is_not():
    queue = int((MAX_WAIT_S + 7) * FAST.prefill_tokens_per_s)
    with pytest.raises(Unavailable) as refused:
        choose(0, 50, [worker("m", M, queued_tokens=queue)])
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(7)
    assert choose(0, 50, [worker("m", M, queued_tokens=queue - 8000)]) == Route("m")


def test_predictions_follow_the_formula():
    view = worker("m", M, queued_tokens=300, running=5)
    assert view.prefill_s(200) == pytest.approx(0.5)
    assert view.decode_s(10) == pytest.approx(10 * 0.01 * 2)
