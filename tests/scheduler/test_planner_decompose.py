"""Several models under shared limits: planned one by one, and how far that can be from the best."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.messages import Role
from scheduler.plan import violations
from scheduler.planner import make_plan
from scheduler.planner_decompose import by_model
from scheduler.planner_model import Options, PlanModel
from scheduler.problem import Bucket, Column, Limit, Problem


@st.composite
def shared(draw):
    models = [f"m{at}" for at in range(draw(st.integers(2, 4)))]
    buckets = [Bucket(b, m, draw(st.floats(0.1, 9))) for m in models for b in ("x", "y")]
    columns = [
        Column(
            f"{m}{gpu}",
            m,
            gpu,
            gpus,
            Role.MIXED,
            price,
            {"x": draw(st.floats(0.5, 5)), "y": draw(st.floats(0.5, 5))},
        )
        for m in models
        for gpu, gpus, price in (("small", 1, 1.0), ("big", 2, 3.5))
    ]
    limits = (Limit("small", draw(st.integers(0, 30))), Limit("big", draw(st.integers(0, 60))))
    return Problem(tuple(buckets), tuple(columns), limits)


@settings(max_examples=80, deadline=None)
@given(shared())
def test_the_bound_is_below_and_the_plan_above_the_best(problem):
    options = Options()
    counts = by_model(problem, options, lambda: 60.0)
    if counts is None:
        return
    best = PlanModel(problem, options).program.solve(time_limit=60, gap=0).objective
    prices = {column.name: column.price for column in problem.columns}
    cost = math.fsum(prices[name] * n for name, n in counts.replicas.items())
    assert counts.bound <= best + 1e-6
    assert cost >= best - 1e-6


@settings(max_examples=80, deadline=None)
@given(shared())
def test_the_plan_is_the_best_whatever_way_it_was_found(problem):
    plan = make_plan(problem, Options(), time.perf_counter)
    assert violations(problem, plan) == []
    if plan.status == "optimal":
        best = PlanModel(problem, Options()).program.solve(time_limit=60, gap=0).objective
        assert plan.cost == pytest.approx(best, abs=1e-6)


def test_one_model_or_whole_nodes_are_planned_together():
    one = Problem((Bucket("x", "m", 1),), (Column("c", "m", "g", 1, Role.MIXED, 1, {"x": 1}),))
    assert by_model(one, Options(), lambda: 60.0) is None
