"""Routing: which worker takes a request, given what steps cost on each and what it holds now."""

from __future__ import annotations

import random

import pytest

from scheduler.cost import CostModel, context_sum
from scheduler.errors import Unavailable
from scheduler.fleet import SAMPLE, SHORTLIST, Fleet, Worker
from scheduler.messages import Address, Role
from scheduler.policies import POLICIES, threshold
from scheduler.pricing import Demand
from scheduler.routing import MAX_WAIT_S, choose, priced
from scheduler.shares import Allowance, Planned

# A full step of 512 prompt tokens takes 0.512 s, a lone decode 0.011 s.
# The KV cache of 100 tokens takes 0.01 s from one worker to another.
FAST = CostModel(0.0, 0.001, 0.0, 0.011, 0.0, "measured", 1e4, 1e8)
SLOW = FAST.slower(10)
NOW = 100.0
SIZES = len(Planned(1.0).rates)


def worker(
    name: str, role: Role, cost: CostModel = FAST, *, queue: int = 0, price: float = 0.0, **load
) -> Worker:
    """With a `price` it is in a plan, which lets it have any number of requests.

    The prompts of those who run are computed, unless `load` says otherwise.
    """
    load.setdefault("decoding", load.get("running", 0))
    allowance = Allowance(Planned(price, (1e9,) * SIZES)) if price else None
    address = Address(f"host-{name}", 1)
    made = Worker(name, role, address, cost, allowance=allowance, **load)
    if queue:
        made.enqueue((0, 0), queue, context_sum(0, queue), NOW)
    return made


def fleet(*workers: Worker) -> Fleet:
    made = Fleet()
    for each in workers:
        made.add(each)
    return made


def half() -> float:
    return 0.5


def chosen(workers, demand=None, policy=priced, **options) -> tuple:
    """(who computes the prompt, who decodes), or one name for both; and why, if degraded."""
    demand = demand or Demand(100, 50)
    route = choose(demand, fleet(*workers), NOW, half, policy, **options)
    names = dict.fromkeys((route.prefill.name, route.decode.name))
    return (*names, route.degraded) if route.degraded else tuple(names)


P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED

WITHOUT_LIMITS = {
    "a mixed worker alone does all": ([worker("m", M)], ("m",)),
    "a prompt on the decode worker, when that is no slower": (
        [worker("p", P, FAST.slower(1.1)), worker("d", D)],
        ("d",),
    ),
    "apart, when the decode worker is slow with prompts": (
        [worker("p", P), worker("d", D, SLOW)],
        ("p", "d"),
    ),
    "apart, when its queue is long": ([worker("p", P), worker("d", D, queue=5000)], ("p", "d")),
    "not apart, when those who would be held up have not begun: their prompts queue elsewhere": (
        [worker("p", P, queue=5000), worker("d", D, running=9, decoding=1, outputs=100.0)],
        ("d",),
    ),
    "not apart for less than a step there: blocks are reserved between two": (
        [worker("p", P), worker("d", D, queue=500)],
        ("d",),
    ),
    "a fast worker's queue costs those behind it too: so a slow one without": (
        [worker("m", M, queue=60), worker("n", M, FAST.slower(1.3))],
        ("n",),
    ),
    "not apart over a slow link": (
        [
            worker("p", P, CostModel(0, 0.001, 0, 0.011, 0, "measured", 1e5, 1e6)),
            worker("d", D, queue=500),
        ],
        ("d",),
    ),
    "apart, when it would hold up those who decode there": (
        [worker("p", P), worker("d", D, running=1)],
        ("p", "d"),
    ),
    "the faster prefill": (
        [worker("p", P, SLOW), worker("q", P), worker("d", D, queue=5000)],
        ("q", "d"),
    ),
    "the slower prefill when the faster one's queue is long": (
        [worker("p", P, FAST.slower(2)), worker("q", P, queue=2000), worker("d", D, queue=2000)],
        ("p", "d"),
    ),
    "the faster decode": ([worker("d", M, SLOW), worker("e", M)], ("e",)),
    "the less busy decode": ([worker("d", M, running=3), worker("e", M, running=2)], ("e",)),
    "a slow decode before a fast one that is very busy": (
        [worker("d", M, FAST.slower(2)), worker("e", M, running=50)],
        ("d",),
    ),
    "a fast pair before a slow mixed worker": (
        [worker("p", P), worker("d", D, running=1), worker("m", M, SLOW)],
        ("p", "d"),
    ),
    "room for the whole output before speed": (
        [worker("d", M, kv_tokens=100), worker("e", M, SLOW, kv_tokens=4000)],
        ("d", "e"),
    ),
    "too little room everywhere: the worker itself will say so": (
        [worker("d", M, kv_tokens=50), worker("e", M, SLOW, kv_tokens=60)],
        ("d",),
    ),
    "a free cache before a full one": (
        [
            worker("d", M, kv_tokens=1000, held=900, running=1, left=900),
            worker("e", M, FAST.slower(2), kv_tokens=1000),
        ],
        ("e",),
    ),
    "equals: by name, so that two routers agree": ([worker("b", M), worker("a", M)], ("a",)),
    "a draining worker gets nothing": (
        [worker("m", M, draining=True), worker("n", M, SLOW)],
        ("n",),
    ),
    "an unsound worker neither": (
        [worker("m", M, sound=lambda now: now != NOW), worker("n", M, SLOW)],
        ("n",),
    ),
    "unless all are": ([worker("m", M, sound=lambda now: False)], ("m",)),
    "degraded: only a decode worker is left": ([worker("d", D)], ("d", "no_prefill")),
    "degraded: only a prefill worker is left": ([worker("p", P)], ("p", "no_decode")),
    "a worker that stands still is waited for, so another is better": (
        [worker("m", M, heard=NOW - 3), worker("n", M, FAST.slower(2), heard=NOW - 0.1)],
        ("n",),
    ),
    "a step that takes for ever too": (
        [worker("m", M, heard=NOW, standing=3.0), worker("n", M, FAST.slower(2), heard=NOW)],
        ("n",),
    ),
}


@pytest.mark.parametrize(("workers", "route"), WITHOUT_LIMITS.values(), ids=WITHOUT_LIMITS)
def test_without_limits_the_fewest_seconds_win(workers, route):
    assert chosen(workers) == route


def busy(name: str, role: Role, cost: CostModel = FAST, *, slack: float, running: int = 1, **load):
    """Decodes so many choices whose limits leave them this slack, each, at today's pace."""
    made = worker(name, role, cost, running=running, limited=running, timed=running, **load)
    made.started, made.limited_left, made.left = NOW * running, 10.0 * running, 10.0 * running
    pace = made.tpot_s(1, 0.0, NOW)
    made.allowed = running * (slack + 10.0 * pace)
    return made


LIMITS = Demand(100, 50, ttft_s=1.0, tpot_s=0.1)
WITH_LIMITS = {
    "in time on the cheaper worker, though another is faster": (
        [worker("m", M, price=4.0), worker("n", M, FAST.slower(2), price=1.0)],
        ("n",),
    ),
    "the dearer one when the cheaper one is late": (
        [worker("m", M, price=4.0), worker("n", M, SLOW, price=1.0)],
        ("m",),
    ),
    "late everywhere: the least late": (
        [worker("m", M, FAST.slower(20)), worker("n", M, FAST.slower(15))],
        ("n",),
    ),
    "who runs there has no slack for this prompt: it is computed elsewhere": (
        [busy("d", D, slack=0.1, price=1.0), worker("p", P, FAST.slower(2), price=1e6)],
        ("p", "d"),
    ),
    "who runs there has slack enough": (
        [busy("d", D, slack=0.5, price=1.0), worker("p", P, FAST.slower(2), price=1e6)],
        ("d",),
    ),
    "no plan hands over from a mixed worker": (
        [busy("d", D, slack=0.1, price=1.0), worker("m", M, FAST.slower(2), price=1e3)],
        ("m",),
    ),
    "on a prefill worker, if there is one": ([busy("d", D, slack=0.1), worker("p", P)], ("p", "d")),
}


@pytest.mark.parametrize(("workers", "route"), WITH_LIMITS.values(), ids=WITH_LIMITS)
def test_with_limits_the_cheapest_in_time_wins(workers, route):
    assert chosen(workers, LIMITS) == route


def test_tokens_that_a_worker_holds_are_work_done():
    m, n = worker("m", M), worker("n", M, queue=50)
    assert chosen([m, n], Demand(100, 50, cached={n: 90})) == ("n",)
    assert chosen([m, n], Demand(100, 50, cached={n: 10})) == ("m",)


def test_a_prompt_that_is_all_cached_still_computes_its_last_token():
    m = worker("m", M)
    assert Demand(100, cached={m: 100}).work(m) == (1, 100)


def test_a_lower_rank_does_not_wait_for_a_higher_one():
    m = worker("m", M, queue=1000)
    assert m.wait_s((-1, 0), NOW) == 0
    assert m.wait_s((0, 1), NOW) == pytest.approx(1.0)


def test_the_prompt_at_the_head_of_the_queue_gets_shorter_while_it_is_computed():
    m = worker("m", M, queue=1000)
    assert m.wait_s((0, 0), NOW + 0.4) == pytest.approx(0.6)
    assert m.wait_s((0, 0), NOW + 9) == 0
    m.enqueue((0, 0), 500, 0, NOW)  # the mean of the two may be done, not both
    assert m.wait_s((0, 0), NOW + 9) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("avoid", "route"),
    [
        ({"p"}, ("q", "d")),
        ({"p", "q"}, ("d", "no_prefill")),
        ({"d"}, ("p", "no_decode")),
        ({"p", "q", "d"}, ("p", "d")),
    ],
    ids=["one prefill", "all prefill", "the decode", "everybody: better than nobody"],
)
def test_workers_that_failed_the_request_are_avoided(avoid, route):
    workers = [worker("p", P), worker("q", P, SLOW), worker("d", D, queue=5000)]
    assert chosen(workers, Demand(100, 50, avoid=frozenset(avoid))) == route


@pytest.mark.parametrize(
    ("workers", "route"),
    [
        ([worker("p", P), worker("d", D, SLOW)], ("d",)),
        ([worker("p", P), worker("d", D, SLOW), worker("m", M)], ("m",)),
        ([worker("p", P)], ("p", "no_decode")),
    ],
    ids=["the decode worker computes the prompt too", "or a mixed one", "or whoever is there"],
)
def test_after_a_failed_hand_over_the_request_stays_on_one_worker(workers, route):
    assert chosen(workers, Demand(100, 50, split=False)) == route


def test_two_mixed_workers_never_wait_for_each_others_blocks():
    a, b, c = worker("a", M), worker("b", M), worker("c", M, FAST.slower(0.5))
    p, d = worker("p", P), worker("d", D)
    pairs = {(x.name, y.name) for x in (a, b, c, p, d) for y in (a, b, c, d) if x.may_hand_to(y)}
    assert pairs & {("a", "b"), ("b", "a")} == {("a", "b")}
    assert {("c", "a"), ("c", "b"), ("p", "a"), ("a", "d")} <= pairs
    assert not pairs & {("a", "c"), ("b", "c"), ("a", "a")}


def test_a_job_that_ends_with_its_prompt_goes_to_whoever_is_soonest_whatever_the_role():
    workers = [worker("p", P), worker("d", D, SLOW), worker("m", M, queue=500)]
    assert chosen(workers, Demand(100, prefill_only=True)) == ("p",)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [[], [worker("m", M, draining=True)]], ids=["none", "draining"])
def test_nobody_is_there(workers):
    with pytest.raises(Unavailable) as refused:
        chosen(workers)
    assert (refused.value.status, refused.value.retry_after) == (503, 2)


def test_decode_workers_may_be_told_to_take_no_prompts():
    with pytest.raises(Unavailable, match="no prefill worker") as refused:
        chosen([worker("d", D)], local=False)
    assert refused.value.status == 503
    assert chosen([worker("p", P, SLOW), worker("d", D)], local=False) == ("d",)
    replay = Demand(100, 50, avoid=frozenset("p"))
    assert chosen([worker("p", P), worker("d", D)], replay, local=False) == ("d", "no_prefill")


def test_a_queue_that_is_too_long_is_refused_with_the_time_until_it_is_not():
    queue = int((MAX_WAIT_S + 7) * 1000)
    with pytest.raises(Unavailable) as refused:
        chosen([worker("m", M, queue=queue)], Demand(1, 50))
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(7, abs=0.01)
    assert chosen([worker("m", M, queue=queue - 8000)], Demand(1, 50)) == ("m",)


def test_a_request_that_could_only_be_late_is_refused_with_the_time_until_it_is_not():
    """It needs 0.1 s itself, and of the limit of 1 s a tenth is kept back: 3 s must become 0.8."""
    with pytest.raises(Unavailable) as refused:
        chosen([worker("m", M, queue=3000)], LIMITS)
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(2.2)


def test_a_pace_that_could_only_be_broken_is_refused_until_somebody_has_ended():
    m = busy("m", M, slack=0.0, running=20)
    m.outputs = 0.0
    with pytest.raises(Unavailable) as refused:
        chosen([m], Demand(1, 50, tpot_s=0.2))
    assert refused.value.status == 429
    # Each has 10 tokens left, and so had 20: one of the 20 ends after a step, on the mean.
    assert refused.value.retry_after == pytest.approx(m.tpot_s(1, 26.0, NOW))


def test_one_that_is_late_by_its_own_length_is_served():
    assert chosen([worker("m", M, queue=300)], Demand(5000, 50, ttft_s=1.0)) == ("m",)


# ── many workers ────────────────────────────────────────────────────────────────────────────────


def test_among_many_a_sample_is_looked_at_with_every_role_and_speed_in_it():
    costs = {"p": FAST, "d": SLOW}
    many = fleet(
        *(worker(f"{r}{i}", {"p": P, "d": D}[r], costs[r]) for r in "pd" for i in range(500)),
        worker("rare", D, FAST),
    )
    draw = random.Random(5).random
    seen = many.candidates(NOW, draw)
    assert len(seen) <= SAMPLE < SHORTLIST
    assert {w.role for w in seen} == {P, D}
    assert many.get("rare") in seen
    first, second = many.candidates(NOW, draw), many.candidates(NOW, draw)
    assert first != second


# ── other policies ──────────────────────────────────────────────────────────────────────────────

TWO_PAIRS = [worker("p", P), worker("q", P), worker("d", D), worker("e", D)]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("shape", ["m", "mm", "d", "p", "pd", "ppdd", "pdm"])
def test_every_policy_finds_a_route_in_every_shape_of_cluster(policy, shape):
    roles = {"p": P, "d": D, "m": M}
    workers = [worker(f"{letter}{i}", roles[letter]) for i, letter in enumerate(shape)]
    for number in range(4):
        assert chosen(workers, Demand(5000, 50, number=number), policy)


def test_round_robin_takes_turns():
    routes = [chosen(TWO_PAIRS, Demand(9, number=n), POLICIES["round-robin"]) for n in range(3)]
    assert routes == [("p", "d"), ("q", "e"), ("p", "d")]


def test_least_load_counts_what_is_outstanding_and_sees_no_speed():
    workers = [worker("m", M, outstanding=2), worker("n", M, SLOW, outstanding=1)]
    assert chosen(workers, policy=POLICIES["least-load"]) == ("n",)


def test_power_of_two_takes_the_less_loaded_of_two_draws():
    workers = [worker(name, M, outstanding=load) for name, load in (("a", 0), ("b", 5), ("c", 9))]
    draws = iter((0.9, 0.5))
    route = choose(Demand(9), fleet(*workers), NOW, lambda: next(draws), POLICIES["power-of-two"])
    assert route.decode.name == "b"


def test_prefix_threshold_prefills_elsewhere_only_what_is_long_and_not_cached():
    rule = threshold(1000)
    assert chosen(TWO_PAIRS, Demand(1000), rule) == ("d",)
    assert chosen(TWO_PAIRS, Demand(1001), rule) == ("p", "d")
    held = {TWO_PAIRS[3]: 500}
    assert chosen(TWO_PAIRS, Demand(1200, cached=held), rule) == ("e",)


def test_predictions_follow_the_formula():
    cost = CostModel(0.01, 0.001, 1e-6, 0.002, 1e-5, "measured")
    view = worker("m", M, cost, running=5, context=1000.0, left=0.0)
    room = 512 - 5
    beside = 0.01 + 0.002 * 5 + 1e-5 * 1000
    assert view.prompt_s(300, 4500) == pytest.approx(300 * (0.001 + beside / room) + 4500e-6)
    assert view.tpot_s(1, 200, NOW) == pytest.approx(0.01 + 0.002 * 6 + 1e-5 * 1200)
    view.enqueue((0, 0), 1000, 0, NOW)  # a second of its next three is a prompt's
    assert view.tpot_s(1, 200, NOW) == pytest.approx(0.034 / (2 / 3))
