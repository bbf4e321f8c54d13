"""Placements: what a request adds to its workers is taken off again, whatever happens to it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.affinity import KEYS_MOST, Chain, Prefixes, chain_of
from scheduler.cost import CostModel
from scheduler.fairness import FairShare
from scheduler.fleet import Fleet, Worker
from scheduler.forecast import OUTPUT_TOKENS, Forecast
from scheduler.messages import Address, Role
from scheduler.placing import Placer
from scheduler.policies import POLICIES
from scheduler.pricing import Demand

COST = CostModel(0.01, 1e-4, 0.0, 1e-3, 1e-6, "measured", 1e5, 1e8)


def worker(name: str, role: Role = Role.MIXED, **fields) -> Worker:
    return Worker(name, role, Address("h", 1), COST, **fields)


def placer(*workers: Worker, policy: str = "priced") -> Placer:
    fleet = Fleet()
    for each in workers:
        fleet.add(each)
    return Placer(fleet, random.Random(0).random, POLICIES[policy])


STEPS = ["first", "emitted", "arrived", "end"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 5000),
            st.sampled_from([math.inf, 0.1]),
            st.integers(1, 3),
            st.booleans(),
            st.lists(st.sampled_from(STEPS), max_size=8),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(list(POLICIES)),
)
def test_whatever_happens_nothing_is_left_when_all_have_ended(requests, policy):
    workers = [worker("p", Role.PREFILL), worker("d", Role.DECODE), worker("m")]
    it, now, placed = placer(*workers, policy=policy), 0.0, []
    for tokens, tpot, choices, only, steps in requests:
        demand = Demand(tokens, 20, choices, tpot_s=tpot, prefill_only=only, rank=(choices, 0))
        placement = it.place(demand, Chain(), now)
        placed.append(placement)
        for step in steps:
            now += 0.01
            arguments = {"first": (now,), "emitted": (3,), "arrived": (now,), "end": (now,)}[step]
            getattr(it, step)(placement, *arguments)
        for each in workers:
            assert min(each.running, each.limited, each.outstanding) >= 0
            assert min(each.left, each.limited_left, each.moving) >= -1e-6
    for placement in placed:
        it.end(placement, now)
        it.end(placement, now)
    for each in workers:
        assert each.idle
        assert each.moving == pytest.approx(0, abs=1e-3)
        assert (each.context, each.held, each.left, each.allowed) == (0, 0, 0, 0)


def test_a_prompt_queues_until_its_first_token():
    m = worker("m")
    it = placer(m)
    placement = it.place(Demand(1000), Chain(), 0.0)
    assert m.queued[0, 0].tokens == 1000
    it.first(placement, 1.0)
    assert m.queued == {}
    assert (m.running, m.left) == (1, OUTPUT_TOKENS - 1)


def slack(one: Worker, pace: float, now: float) -> float:
    return one.allowed - one.needed_s(pace, now)


def test_slack_is_what_a_limit_allows_beyond_todays_pace():
    m = worker("m")
    it = placer(m)
    placement = it.place(Demand(10, 11, tpot_s=0.1), Chain(), 0.0)
    it.first(placement, 1.0)
    assert slack(m, 0.03, 1.0) == pytest.approx(10 * (0.1 - 0.03))
    it.emitted(placement, 5)
    assert slack(m, 0.03, 1.0 + 5 * 0.03) == pytest.approx(0.7)  # a steady pace keeps it
    assert slack(m, 0.03, 1.0 + 5 * 0.03 + 0.2) == pytest.approx(0.5)  # a stall does not


def test_one_that_is_longer_than_was_predicted_does_not_look_late_for_it():
    m = worker("m")
    it = placer(m)
    placement = it.place(Demand(10, 11, tpot_s=0.1), Chain(), 0.0)
    it.first(placement, 0.0)
    it.emitted(placement, 10)
    before = slack(m, 0.03, 10 * 0.03)
    it.emitted(placement, 100)
    assert slack(m, 0.03, 110 * 0.03) == pytest.approx(before + 100 * (0.1 - 0.03))
    it.end(placement, 4.0)
    assert (m.limited, m.allowed, m.limited_left) == (0, 0, 0)


def test_requests_that_begin_alike_meet_where_the_beginning_is_and_a_report_corrects_that():
    workers = [worker("a"), worker("b")]
    it = placer(*workers)
    chain = chain_of(["x" * 9000])
    demand = Demand(2250, 10)
    first = it.place(demand, chain, 0.0)
    it.first(first, 1.0)
    second = it.place(demand, chain, 1.0)
    assert first.prefill is second.prefill
    assert second.tokens < 600
    it.first(second, 2.0, cached=0)  # it has evicted everything
    assert it.place(demand, chain, 2.0).tokens == 2250


# ── prefixes ────────────────────────────────────────────────────────────────────────────────────


def test_a_chain_has_few_pieces_and_differs_from_where_the_text_does():
    one, two = chain_of(["a" * 200_000]), chain_of(["a" * 150_000 + "b" * 50_000])
    assert len(one.keys) < 70
    same = [left == right for left, right in zip(one.keys, two.keys, strict=True)]
    cut = same.index(False)
    assert all(same[:cut])
    assert not any(same[cut:])
    assert one.ends[cut - 1] <= 150_000 < one.ends[cut]
    assert chain_of(["ab", "c"]).keys == chain_of(["ab\0c"]).keys == ()


def test_texts_are_kept_apart():
    pad = "x" * 300
    assert chain_of(["ab", "c" + pad]).keys != chain_of(["a", "bc" + pad]).keys


def test_a_worker_holds_a_prefix_only_as_far_as_it_holds_all_of_it():
    prefixes, a, b = Prefixes(), worker("a"), worker("b")
    chain = Chain((1, 2, 3), (10, 20, 30), 35)
    prefixes.add(chain, a)
    prefixes.add(Chain((1, 2), (10, 20), 20), b)
    assert prefixes.find(chain) == {a: 30, b: 20}
    prefixes.forget(chain, a, beyond=10)
    assert prefixes.find(chain) == {a: 10, b: 20}
    prefixes.forget(chain, b, beyond=0)
    assert prefixes.find(Chain((9, 1), (5, 10), 10)) == {}


def test_the_least_recently_used_is_forgotten_first():
    prefixes, a = Prefixes(most=3), worker("a")
    for key in (1, 2, 3):
        prefixes.add(Chain((key,), (10,), 10), a)
    prefixes.add(Chain((1,), (10,), 10), a)
    prefixes.add(Chain((4,), (10,), 10), a)
    known = [key for key in (1, 2, 3, 4) if prefixes.find(Chain((key,), (10,), 10))]
    assert (known, len(prefixes)) == ([1, 3, 4], 3)
    assert KEYS_MOST > 3


# ── what requests look like ─────────────────────────────────────────────────────────────────────


def test_outputs_are_predicted_by_the_size_of_the_prompt():
    forecast = Forecast()
    assert forecast.output_tokens(100) == OUTPUT_TOKENS
    for _ in range(30):
        forecast.learn_end(100, 10)
        forecast.learn_end(4000, 300)
    assert forecast.output_tokens(120) == pytest.approx(10)
    assert forecast.output_tokens(3000) == pytest.approx(300)
    assert forecast.output_tokens(100_000) == pytest.approx(300)  # the nearest that is known


def test_answers_that_still_run_count_as_far_as_they_have_come():
    forecast, ended = Forecast(), Forecast()
    for tokens in (40, 500) * 20:  # half are short, and have ended; the long ones still run
        forecast.learn_growth(100, 1, min(tokens, 90))
        if tokens < 90:
            forecast.learn_end(100, tokens)
            ended.learn_growth(100, 1, tokens)
            ended.learn_end(100, tokens)
    assert ended.output_tokens(100) == pytest.approx(40)
    assert 100 < forecast.output_tokens(100) < 200
    for _ in range(20):
        forecast.learn_growth(100, 90, 500)
        forecast.learn_end(100, 500)
    assert forecast.output_tokens(100) == pytest.approx(270, rel=0.1)


def test_prompts_are_sized_by_their_characters():
    forecast = Forecast()
    assert forecast.prompt_tokens(4000) == 1000
    for _ in range(200):
        forecast.learn_prompt(4000, 2000)
    assert forecast.prompt_tokens(4000) == pytest.approx(2000, rel=0.01)


# ── fair share ──────────────────────────────────────────────────────────────────────────────────


def test_who_was_served_more_waits_behind_who_was_served_less():
    share = FairShare(quantum=1000)
    assert share.enter("greedy", 5000) == 0
    assert share.enter("modest", 100) == 0
    share.serve("greedy", 500)
    # A newcomer starts at the least of those who are there: 5,000 + 2 · 500 against 5,100.
    assert share.enter("greedy", 10) == 0
    share.serve("greedy", 2000)
    assert share.enter("greedy", 10) == 4
    assert share.enter("modest", 10) == 0


def test_nobody_saves_up_by_being_away():
    share = FairShare(quantum=1000)
    share.enter("a", 1)
    share.enter("b", 1)
    share.leave("b")
    share.serve("a", 10_000)
    assert share.enter("b", 1) == 0
    share.serve("b", 5000)
    assert share.enter("b", 1) == 10


def test_when_all_have_left_everybody_is_equal_again():
    share = FairShare(quantum=1000)
    share.enter("a", 9000)
    share.leave("a")
    share.enter("b", 1)
    assert share.enter("a", 1) == 0
