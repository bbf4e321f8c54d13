"""Laws of the optimisation, on problems small enough to be checked by hand or by trying all."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scipy.optimize import linprog

from scheduler.errors import SetupError
from scheduler.head_room import enough, usable
from scheduler.messages import Role
from scheduler.plan import violations
from scheduler.planner import make_plan
from scheduler.planner_model import Options, switching_cost
from scheduler.problem import Bucket, Column, Limit, Problem, WholeNodes

M, P, D = Role.MIXED, Role.PREFILL, Role.DECODE


def column(name, capacity, price=1.0, **other):
    fields = {"model": "m", "gpu": name, "gpus": 1, "role": M, **other}
    return Column(name=name, price=price, capacity=capacity, **fields)


def buckets(**rates):
    return tuple(Bucket(name, "m", rate) for name, rate in rates.items())


def solve(problem, **options):
    plan = make_plan(problem, Options(**options), time.perf_counter)
    assert violations(problem, plan) == []
    return plan


# ── Mélange's README example ────────────────────────────────────────────────────────────────────

README = Problem(
    buckets=buckets(ss=30 * 0.2, sl=30 * 0.1, ls=30 * 0.5, ll=30 * 0.2),
    columns=(
        column("A10G", {"ss": 2, "sl": 1, "ls": 5, "ll": 2}, price=1.01),
        column("A100", {"ss": 20, "sl": 20, "ls": 40, "ll": 20}, price=3.67),
    ),
)


@pytest.mark.parametrize(
    ("slices", "cost", "replicas"),
    [
        (1, 6.70, {"A10G": 3, "A100": 1}),
        (2, 5.69, {"A10G": 2, "A100": 1}),
        (3, 4.68, {"A10G": 1, "A100": 1}),
        (8, 5.69, {"A10G": 2, "A100": 1}),
        (16, 5.69, {"A10G": 2, "A100": 1}),
        (None, 4.68, {"A10G": 1, "A100": 1}),
    ],
)
def test_melange_example_costs_what_slices_make_of_it_and_least_without(slices, cost, replicas):
    plan = solve(README, slices=slices)
    assert (plan.cost, plan.replicas, plan.gap, plan.status) == (cost, replicas, 0, "optimal")


# ── laws over random problems ───────────────────────────────────────────────────────────────────


@st.composite
def problems(draw, most_buckets=6, most_columns=4, roles=(M,)):
    count = draw(st.integers(1, most_buckets))
    rates = draw(st.lists(st.floats(0.01, 20), min_size=count, max_size=count))
    names = [f"b{at}" for at in range(count)]
    columns = []
    for at in range(draw(st.integers(1, most_columns))):
        able = names if at == 0 else draw(st.lists(st.sampled_from(names), unique=True))
        columns.append(
            column(
                f"c{at}",
                {name: draw(st.floats(0.5, 30)) for name in able},
                price=draw(st.floats(0.5, 10)),
                role=draw(st.sampled_from(roles)),
            )
        )
    return Problem(buckets(**dict(zip(names, rates, strict=True))), tuple(columns))


@settings(max_examples=200, deadline=None)
@given(problems(most_buckets=5, most_columns=3))
def test_never_dearer_than_the_sliced_form(problem):
    ours = solve(problem)
    assert ours.gap == 0
    for slices in (1, 2, 3, 4, 8, 16):
        assert ours.cost <= solve(problem, slices=slices).cost + 1e-9


def least_by_trying(problem):
    """The least cost over all counts, each checked by a linear program of its own."""
    columns, asked = problem.columns, problem.buckets
    highest = [
        math.ceil(sum(b.rate / c.capacity[b.name] for b in asked if b.name in c.capacity))
        for c in columns
    ]
    best = math.inf
    for counts in itertools.product(*(range(high + 1) for high in highest)):
        cost = sum(c.price * n for c, n in zip(columns, counts, strict=True))
        if cost < best and can_serve(asked, columns, counts):
            best = cost
    return best


def can_serve(asked, columns, counts):
    pairs = [(b, c) for b in asked for c in columns if b.name in c.capacity]
    serve = [[float(pair[0] is b) for pair in pairs] for b in asked]
    load = [
        [b.rate / c.capacity[b.name] if c is column else 0.0 for b, c in pairs]
        for column in columns
    ]
    result = linprog(
        [0.0] * len(pairs), A_ub=load, b_ub=counts, A_eq=serve, b_eq=[1.0] * len(asked)
    )
    return result.status == 0


@settings(max_examples=60, deadline=None)
@given(problems(most_buckets=3, most_columns=2))
def test_equal_to_trying_all_counts(problem):
    if (
        math.prod(len(c.capacity) for c in problem.columns)
        and sum(
            b.rate / min(c.capacity.values())
            for b in problem.buckets
            for c in problem.columns
            if c.capacity
        )
        > 60
    ):
        problem = Problem(
            tuple(Bucket(b.name, b.model, b.rate / 20) for b in problem.buckets), problem.columns
        )
    assert solve(problem).cost == pytest.approx(least_by_trying(problem), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems(roles=(M, P, D)), st.integers(0, 6))
def test_roles_and_limits_shed_rather_than_lie(problem, gpus):
    limited = Problem(
        problem.buckets, problem.columns, tuple(Limit(c.gpu, gpus) for c in problem.columns)
    )
    free, bound = solve(problem), solve(limited)
    lost = {name for name, share in bound.shed.items() if share > 1e-6}
    assert set(free.shed) <= lost | {name for name, share in free.shed.items() if share < 1e-6}
    assert (bound.status == "partial") == bool(bound.shed)


# ── roles ───────────────────────────────────────────────────────────────────────────────────────


def test_a_split_is_taken_where_it_is_cheaper_and_its_shares_agree():
    problem = Problem(
        buckets(b=10),
        (
            column("mixed", {"b": 1}, price=1),
            column("prefill", {"b": 10}, price=2, role=P),
            column("decode", {"b": 5}, price=1, role=D),
        ),
    )
    plan = solve(problem)
    assert (plan.cost, plan.replicas) == (4, {"prefill": 1, "decode": 2})
    assert plan.routing == {"b": {"prefill": 1.0, "decode": 1.0}}


def test_prefill_without_decode_serves_nobody():
    plan = solve(Problem(buckets(b=1), (column("prefill", {"b": 10}, role=P),)))
    assert (plan.status, plan.shed, plan.replicas) == ("partial", {"b": 1.0}, {})


def test_a_kv_cache_does_not_leave_its_region():
    here, there = {"region": "here"}, {"region": "there"}
    apart = (column("p", {"b": 9}, role=P, **here), column("d", {"b": 9}, role=D, **there))
    assert solve(Problem(buckets(b=1), apart)).shed == {"b": 1.0}
    together = (*apart, column("d2", {"b": 9}, price=5, role=D, **here))
    assert solve(Problem(buckets(b=1), together)).replicas == {"p": 1, "d2": 1}


def test_a_slow_link_asks_for_more_replicas():
    pair = (column("p", {"b": 9}, role=P, link={"b": 2}), column("d", {"b": 9}, role=D))
    assert solve(Problem(buckets(b=6), pair)).replicas == {"p": 3, "d": 1}


# ── limits, nodes, markets ──────────────────────────────────────────────────────────────────────


def test_limits_are_shared_by_models():
    problem = Problem(
        (Bucket("b", "m", 4), Bucket("b", "n", 4)),
        (
            column("m-big", {"b": 4}, gpu="big", gpus=2),
            column("n-big", {"b": 4}, gpu="big", gpus=2, model="n"),
            column("n-small", {"b": 1}, gpu="small", model="n"),
        ),
        (Limit("big", 3),),
    )
    plan = solve(problem)
    assert plan.replicas == {"m-big": 1, "n-small": 4}
    assert plan.routing == {"b": {"m-big": 1.0, "n-small": 1.0}}


def test_a_limit_sheds_the_least_and_says_how_much():
    problem = Problem(buckets(b=10), (column("g", {"b": 4}),), (Limit("g", 2),))
    plan = solve(problem)
    assert (plan.status, plan.replicas, plan.gap) == ("partial", {"g": 2}, 0)
    assert plan.shed["b"] == pytest.approx(0.2)


def test_two_models_share_a_bucket_name_in_shed():
    problem = Problem((Bucket("b", "m", 1), Bucket("b", "n", 1)), (column("m1", {"b": 2}),))
    assert solve(problem).shed == {"n/b": 1.0}


def test_whole_nodes_are_paid_for_whole():
    problem = Problem(
        buckets(b=5),
        (
            column("two", {"b": 1}, gpu="A100", gpus=2, price=2),
            column("one", {"b": 1}, gpu="A10G", price=2.5),
        ),
        nodes=(WholeNodes("A100", "on-demand", "", size=8, price=8),),
    )
    # Two nodes hold what five replicas need and cost 16, five A10G 12.50, a node and an A10G 10.50.
    assert (solve(problem).cost, solve(problem).replicas) == (10.5, {"two": 4, "one": 1})


def test_a_floor_under_the_on_demand_share():
    problem = Problem(
        buckets(b=10),
        (column("safe", {"b": 1}, price=3), column("spot", {"b": 1}, price=1, market="spot")),
    )
    assert solve(problem).replicas == {"spot": 10}
    assert solve(problem, on_demand=0.35).replicas == {"safe": 4, "spot": 7} or solve(
        problem, on_demand=0.35
    ).replicas == {"safe": 4, "spot": 6}


def test_switching_keeps_what_runs_until_the_saving_is_worth_it():
    problem = Problem(
        buckets(b=4), (column("old", {"b": 4}, price=3), column("new", {"b": 4}, price=2))
    )
    before = {"old": 1}
    assert solve(problem, previous=before, switching=0.6).replicas == {"old": 1}
    changed = solve(problem, previous=before, switching=0.4)
    assert (changed.replicas, changed.cost) == ({"new": 1}, 2)


def test_a_role_that_is_flipped_counts_for_less_than_a_machine():
    problem = Problem(
        buckets(b=4),
        (
            column("flip", {"b": 4}, price=2, gpu="here", role=M),
            column("prefill", {"b": 4}, price=2, gpu="here", role=P),
            column("rent", {"b": 4}, price=1.9, gpu="there"),
        ),
    )
    assert solve(problem).replicas == {"rent": 1}
    assert solve(problem, previous={"prefill": 1}, switching=0.5).replicas == {"flip": 1}


def test_switching_may_count_by_the_price_of_what_is_switched():
    problem = Problem(
        buckets(b=4), (column("old", {"b": 4}, price=3), column("new", {"b": 4}, price=2))
    )
    assert solve(problem, previous={"old": 1}, wasted=0.21).replicas == {"old": 1}
    assert solve(problem, previous={"old": 1}, wasted=0.19).replicas == {"new": 1}


def test_what_a_plan_counts_for_is_what_it_was_solved_with():
    problem = Problem(
        buckets(b=1),
        (column("a", {"b": 1}, gpu="x"), column("b", {"b": 1}, gpu="x", role=P), column("c", {})),
    )
    options = Options(previous={"a": 2}, switching=1.0, wasted=1.0)
    costs = {
        "stop two": ({}, 4.0),
        "flip one": ({"a": 1, "b": 1}, 0.2),
        "flip two and start one": ({"b": 2, "c": 1}, 0.4 + 2),
    }
    for replicas, cost in costs.values():
        assert switching_cost(problem, options, replicas) == pytest.approx(cost)


def test_more_than_is_needed_may_be_kept_where_stopping_costs_more():
    problem = Problem(buckets(b=3), (column("one", {"b": 1}, price=1),))
    assert solve(problem, previous={"one": 5}, switching=2).replicas == {"one": 5}
    assert solve(problem, previous={"one": 5}, switching=0.5).replicas == {"one": 3}


# ── head-room and spares ────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 400), st.floats(0.01, 3))
def test_head_room_shrinks_with_the_pool(replicas, burst):
    share = usable(replicas, burst) / replicas
    assert 0 < share < usable(replicas + 1, burst) / (replicas + 1) < 1
    assert share + burst * math.sqrt(share / replicas) == pytest.approx(1)


@given(st.floats(0.01, 300), st.floats(0, 3))
def test_enough_is_the_fewest_that_are_usable(load, burst):
    count = enough(load, burst)
    assert usable(count, burst) >= load > usable(count - 1, burst)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 60), st.floats(0.05, 2))
def test_head_room_is_kept_and_wastes_little(rate, burst):
    plan = solve(Problem(buckets(b=rate), (column("g", {"b": 1}, burst=burst),)))
    assert enough(rate * 0.99999, burst) <= plan.replicas["g"] <= enough(rate, burst) + 1


def test_the_loss_of_any_one_replica_leaves_enough():
    cheap = column("cheap", {"b": 2}, price=1)
    big = column("big", {"b": 10}, price=4)
    problem = Problem(buckets(b=10), (cheap, big))
    assert solve(problem).cost == 4
    spared = solve(problem, spare=True)
    assert (spared.cost, spared.replicas) == (6, {"cheap": 6})
    alone = solve(Problem(buckets(b=10), (big,)), spare=True)
    assert alone.replicas == {"big": 2}


def test_where_limits_shed_a_part_spares_shed_more():
    cheap = column("cheap", {"b": 2}, price=1)
    big = column("big", {"b": 10}, price=4)
    limits = tuple(Limit(gpu=each.gpu, gpus=most) for each, most in ((cheap, 3), (big, 1)))
    problem = Problem(buckets(b=20), (cheap, big), limits)
    assert solve(problem).shed == {"b": pytest.approx(0.2)}
    assert solve(problem, spare=True).shed == {"b": pytest.approx(0.7)}  # big is lost: 3 x 2


@settings(max_examples=40, deadline=None)
@given(problems(most_buckets=3, most_columns=3))
def test_spares_hold_for_every_column_that_is_used(problem):
    plan = solve(problem, spare=True)
    counts = [plan.replicas.get(c.name, 0) for c in problem.columns]
    for lost, count in enumerate(counts):
        if count:
            left = [n - (at == lost) + 1e-6 for at, n in enumerate(counts)]
            assert can_serve(problem.buckets, problem.columns, left)


# ── rough edges ─────────────────────────────────────────────────────────────────────────────────


def test_a_trickle_still_gets_a_replica():
    assert solve(Problem(buckets(b=1e-7), (column("g", {"b": 10}),))).replicas == {"g": 1}


def test_a_bucket_without_demand_is_routed_to_what_runs_anyway():
    problem = Problem(buckets(b=1, idle=0), (column("g", {"b": 2, "idle": 1}),))
    assert solve(problem).routing == {"b": {"g": 1.0}, "idle": {"g": 1.0}}


def test_nothing_asked_costs_nothing():
    plan = solve(Problem(buckets(b=0), (column("g", {"b": 1}),)))
    assert (plan.status, plan.cost, plan.replicas, plan.routing) == ("optimal", 0, {}, {"b": {}})


def test_no_columns_at_all_shed_everything():
    plan = solve(Problem(buckets(a=1, b=2), ()))
    assert (plan.status, plan.cost, plan.shed) == ("partial", 0, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("limited", [False, True])
def test_out_of_time_still_gives_a_plan_and_says_how_far_it_may_be(limited):
    def late():  # a clock by which the limit has long passed
        return next(ticks)

    ticks = itertools.count(0, 100)
    names = [f"b{at}" for at in range(40)]
    columns = tuple(
        column(f"c{k}", {n: 1 + (at * 7 + k * 3) % 11 for at, n in enumerate(names)}, 1 + 0.37 * k)
        for k in range(12)
    )
    limits = tuple(Limit(c.gpu, 2) for c in columns) if limited else ()
    problem = Problem(buckets(**dict.fromkeys(names, 1.3)), columns, limits)
    plan = make_plan(problem, Options(time_limit=1e-3), late)
    assert violations(problem, plan) == []
    assert plan.gap >= 0
    assert plan.replicas


def test_spares_that_cannot_be_found_in_time_are_not_promised():
    ticks = itertools.count(0, 100)
    names = [f"b{at}" for at in range(60)]
    columns = tuple(
        column(f"c{k}", {n: 1 + (at * 7 + k * 3) % 11 for at, n in enumerate(names)}, 1 + 0.37 * k)
        for k in range(12)
    )
    problem = Problem(buckets(**dict.fromkeys(names, 1.3)), columns)
    with pytest.raises(SetupError, match="time limit"):
        make_plan(problem, Options(time_limit=1e-3, spare=True), lambda: next(ticks))


def test_balanced_routing_leaves_no_pool_full_while_another_idles():
    problem = Problem(
        buckets(b=3),
        (column("x", {"b": 2}), column("y", {"b": 2.5})),
        (Limit("x", 1), Limit("y", 1)),
    )
    plan = solve(problem)
    loads = [3 * plan.routing["b"][c.name] / c.capacity["b"] for c in problem.columns]
    assert loads == pytest.approx([2 / 3, 2 / 3])
