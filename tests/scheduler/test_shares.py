"""A plan's prices and shares: the cheapest that is in time, each as far as the plan says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scheduler.affinity import Chain
from scheduler.capacity import Slo
from scheduler.cost import CostModel
from scheduler.fleet import Fleet, Worker
from scheduler.messages import Address, Role
from scheduler.placing import Placer
from scheduler.policies import POLICIES
from scheduler.pricing import Demand
from scheduler.shares import (
    HOUR_S,
    WINDOW_S,
    Allowance,
    PlannedBucket,
    planned,
    rounded,
    size_class,
)
from scheduler.simulate import simulate
from scheduler.simulate_coarse import simulate_coarse
from scheduler.simulate_spec import WorkerSpec
from scheduler.workload import Arrival

RATE = 20.0  # requests/s that the plan is for
REPLICAS = {"cheap": 3, "dear": 2}
COLUMNS = {"cheap": ("m", 1.0), "dear": ("m", 4.0)}
COST = CostModel(10e-3, 2e-4, 0.0, 1e-3, 0.0, "assumed")
SLO = Slo(ttft_ms=1000, tpot_ms=60)


def due(**shares):
    return planned([PlannedBucket("b", "m", 400, RATE)], {"b": shares}, COLUMNS)


# ── the plan ────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_due_their_shares_by_the_size_of_the_prompt():
    found = planned(
        [
            PlannedBucket("short", "m", 90, 6.0),
            PlannedBucket("short, long answer", "m", 95, 2.0),
            PlannedBucket("long", "m", 9000, 1.0),
            PlannedBucket("long", "other", 9000, 100.0),
        ],
        {
            "short": {"cheap": 0.5, "dear": 0.5},
            "short, long answer": {"dear": 1.0},
            "long": {"dear": 1.0},
        },
        COLUMNS,
    )
    short, long = size_class(90), size_class(9000)
    assert found["cheap"].rates[short] == 3
    assert found["dear"].rates[short] == 5
    assert (found["cheap"].rates[long], found["dear"].rates[long]) == (0, 1)
    assert found["dear"].price == 4 / HOUR_S


def test_prompts_of_one_bucket_of_the_planner_are_one_size():
    assert [size_class(tokens) for tokens in (1, 25, 26, 100, 16000, 10**6)] == [0, 0, 1, 1, 9, 10]


# ── one column ──────────────────────────────────────────────────────────────────────────────────


def test_a_price_holds_as_long_as_no_more_comes_than_is_due_and_then_rises_steeply():
    allowance = Allowance(due(cheap=1.0)["cheap"])
    price = allowance.plan.price
    now = 0.0
    for _ in range(600):  # the planned rate
        assert allowance.price(400, now) == pytest.approx(price, rel=0.2)
        allowance.take(400, 1.0, now)
        now += 1 / RATE
    for _ in range(60):  # a tenth of the window's at once
        allowance.take(400, 1.0, now)
    assert allowance.price(400, now) > 100 * price
    assert allowance.price(400, now + WINDOW_S) == price  # it was forgotten


def test_what_is_due_nothing_of_a_size_is_dearer_than_anything_that_is():
    cheap = Allowance(due(dear=1.0)["cheap"])
    dear = Allowance(due(dear=1.0)["dear"])
    for _ in range(2000):
        dear.take(400, 1.0, 0.0)
    assert cheap.price(400, 0.0) > dear.price(400, 0.0)
    assert np.isfinite(cheap.price(400, 0.0) * 1e6)


def test_costs_that_are_about_alike_are_one():
    assert rounded(1.01) == rounded(1.2)
    assert rounded(1.0) < rounded(1.3) < rounded(2.0)
    assert rounded(0.0) < rounded(1e-300)


# ── the live fleet ──────────────────────────────────────────────────────────────────────────────


def live(**shares):
    """The router's own objects, with workers of which 16 requests at once keep a TPOT of 30 ms."""
    fleet, allowances = Fleet(), {name: Allowance(each) for name, each in due(**shares).items()}
    for kind, count in REPLICAS.items():
        for number in range(count):
            made = Worker(f"{kind}{number}", Role.MIXED, Address("h", number), COST)
            made.allowance = allowances[kind]
            fleet.add(made)
    return Placer(fleet, lambda: 0.5, POLICIES["priced"])


def place(placer, now, *, tpot_s=0.03):
    demand = Demand(400, 50.0, ttft_s=5.0, tpot_s=tpot_s)
    placement = placer.place(demand, Chain(), now)
    placer.first(placement, now)
    return placement


def test_requests_go_to_the_cheaper_workers_until_these_are_full_then_to_the_dearer():
    placer = live(cheap=1.0)
    kinds = [place(placer, 0.0).decode.name[:-1] for _ in range(33)]
    switch = kinds.index("dear")
    # Full: with one more somebody there is likely to be late, and so the dear ones get it.
    full = sum(1 for _ in itertools.takewhile("cheap".__eq__, kinds))
    assert full == switch >= 3 * 7
    assert set(kinds[switch:]) == {"dear"}


def test_without_a_plan_all_get_alike():
    placer = live()
    for worker in placer.fleet:
        worker.allowance = None
    kinds = [place(placer, 0.0).decode.name[:-1] for _ in range(40)]
    assert 20 <= kinds.count("cheap") <= 28


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_at_the_planned_rate_the_live_fleet_realises_the_plans_shares(share):
    placer = live(cheap=share, dear=1 - share)
    counts, open_ = {"cheap": 0, "dear": 0}, []
    for number in range(1500):
        now = number / RATE
        placement = place(placer, now, tpot_s=1.0)
        counts[placement.decode.name[:-1]] += 1
        open_.append(placement)
        if len(open_) > 15:  # each takes 0.75 s
            placer.end(open_.pop(0), now)
    assert counts["cheap"] / 1500 == pytest.approx(share, abs=0.04)


# ── the simulation ──────────────────────────────────────────────────────────────────────────────


def simulated(run, rate, *, requests=1500, **shares):
    """(share of the cheap ones, attainment) of Poisson arrivals."""
    plans = due(**shares)
    workers = [
        WorkerSpec(f"{kind}{number}", Role.MIXED, COST, 60000, kind=kind, plan=plans[kind])
        for kind, count in REPLICAS.items()
        for number in range(count)
    ]
    at = np.cumsum(np.random.default_rng(1).exponential(1 / rate, requests))
    outcome = run(workers, [Arrival(float(each), 400, 50) for each in at], slo=SLO)
    met = outcome.met(SLO.ttft_ms / 1e3, SLO.tpot_ms / 1e3)
    return float((outcome.prefilled < REPLICAS["cheap"]).mean()), float(met.mean())


@pytest.mark.parametrize(
    ("rate", "share"),
    [
        (RATE / 2, 1.0),  # 12 requests/s are the cheap ones' by the plan
        (0.75 * RATE, 0.6 / 0.75),
        (RATE, 0.6),
        (1.25 * RATE, 0.6),  # beyond the plan all take more
    ],
)
@pytest.mark.parametrize("run", [simulate, simulate_coarse], ids=["steps", "coarse"])
def test_the_cheap_are_filled_first_as_far_as_the_plan_says(run, rate, share):
    cheap, attained = simulated(run, rate, cheap=0.6, dear=0.4)
    assert cheap == pytest.approx(share, abs=0.04)
    assert attained > 0.99
