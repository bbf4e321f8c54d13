"""Whole pools on simulated time: what pricing routes promises beside the fewest outstanding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scheduler.capacity import Slo
from scheduler.cost import CostModel
from scheduler.messages import Role
from scheduler.policies import POLICIES
from scheduler.simulate import simulate
from scheduler.simulate_load import Process, draw
from scheduler.simulate_spec import WorkerSpec
from scheduler.workload import Arrival, read_trace

TRACES = Path(__file__).parents[2] / "loadtest/traces"
# A model of 8 billion parameters on 10 Gbit/s, and three times as fast on 80.
SLOW = CostModel(0.018, 1.5e-4, 6e-9, 1.2e-4, 1.8e-7, "assumed", 131072, 1.25e9)
FAST = CostModel(*SLOW.slower(1 / 3).coefficients, "assumed", 131072, 1e10)
# A model of 13 billion on 200 Gbit/s.
LARGE = CostModel(0.018, 1.6e-4, 5e-9, 1e-4, 4e-7, "assumed", 819200, 2.5e10)
M, D = Role.MIXED, Role.DECODE


def workers(*kinds: tuple[int, Role, CostModel]) -> list[WorkerSpec]:
    return [
        WorkerSpec(f"{role}-{kind}-{at}", role, cost, 120_000, max_sequences=256)
        for kind, (count, role, cost) in enumerate(kinds)
        for at in range(count)
    ]


def trace(name: str, rate: float) -> list[list[Arrival]]:
    """Several draws: the slowest twentieth of one is 15 requests."""
    sizes = read_trace(TRACES / f"azure2023_{name}_0_1200s.csv")
    rngs = [np.random.default_rng(seed) for seed in (77, 78, 79)]
    return [draw(sizes, Process(), rng, count=300, rate=rate) for rng in rngs]


POOLS = {
    "equal, code": (workers((6, M, SLOW)), trace("code", 5)),
    "equal, conversations": (workers((6, M, SLOW)), trace("conv", 9)),
    "unlike, code": (workers((2, M, FAST), (4, M, SLOW)), trace("code", 12)),
    "unlike, conversations": (workers((2, M, FAST), (4, M, SLOW)), trace("conv", 22)),
    "slow ones only decode": (workers((2, M, FAST), (4, D, SLOW)), trace("conv", 20)),
}


@pytest.mark.parametrize(("pool", "draws"), POOLS.values(), ids=POOLS)
def test_without_limits_priced_is_nowhere_worse_than_least_load(pool, draws):
    def latencies(policy: str) -> list[float]:
        """Of the mean and of the slowest twentieth: TTFT, TPOT."""
        found = []
        for requests in draws:
            outcome = simulate(pool, requests, policy=POLICIES[policy])
            for each in outcome.ttft, outcome.tpot[outcome.outputs > 1]:
                found += [each.mean(), np.quantile(each, 0.95)]
        return np.reshape(found, (len(draws), 4)).mean(axis=0).tolist()

    priced, plain = latencies("priced"), latencies("least-load")
    assert all(a <= 1.02 * b for a, b in zip(priced, plain, strict=True)), (priced, plain)


@pytest.mark.parametrize(("pool", "draws"), POOLS.values(), ids=POOLS)
def test_with_limits_more_are_in_time(pool, draws):
    slo = Slo(1000, 60)

    def in_time(policy: str) -> float:
        outcomes = [simulate(pool, each, policy=POLICIES[policy], slo=slo) for each in draws]
        return sum(outcome.met(1.0, 0.06).mean() for outcome in outcomes)

    assert in_time("priced") >= in_time("least-load")


SPLIT = {  # prompt, output tokens; requests a second; whether two workers are better than one
    "short prompts, long answers": (128, 256, 40, False),
    "short prompts, middling answers": (128, 64, 80, False),
    "long prompts, short answers": (2048, 16, 10, True),
    "long prompts, answers with time for them": (2048, 64, 8, True),
}


@pytest.mark.parametrize(("prompt", "output", "rate", "pays"), SPLIT.values(), ids=SPLIT)
def test_mixed_workers_share_a_request_where_that_pays(prompt, output, rate, pays):
    slo = Slo(5e3 * LARGE.prefill_s(prompt), 1.5e3 * LARGE.decode_step_s(1, prompt))
    one = [Arrival(0.0, prompt, output)]
    requests = draw(one, Process(), np.random.default_rng(78), count=300, rate=rate)
    outcome = simulate(workers((8, M, LARGE)), requests, slo=slo)
    split = (outcome.prefilled != outcome.decoded)[~outcome.refused].mean()
    assert split > 0.5 if pays else split == 0
