"""What a route took beside what was predicted, for `/metrics`."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from scheduler.affinity import Chain
from scheduler.cost import CostModel
from scheduler.fleet import Fleet, Worker
from scheduler.messages import Address, Role
from scheduler.placing import Placement, Placer
from scheduler.policies import POLICIES
from scheduler.pricing import Demand
from serving.beliefs import BUCKETS, Beliefs

COST = CostModel(0.01, 1e-4, 0.0, 1e-3, 0.0, "measured")


class Shown:
    """A registry's collector."""

    def __init__(self, beliefs: Beliefs) -> None:
        self.registry = CollectorRegistry()
        self._beliefs = beliefs
        self.registry.register(self)

    def collect(self):
        yield self._beliefs.metric()

    def count(self, what: str, most: float | str = "+Inf") -> float | None:
        labels = {"what": what, "le": str(most)}
        return self.registry.get_sample_value("motley_route_prediction_ratio_bucket", labels)


def placed(policy: str = "priced") -> tuple[Placer, Placement]:
    fleet = Fleet()
    fleet.add(Worker("m", Role.MIXED, Address("h", 1), COST))
    placer = Placer(fleet, lambda: 0.5, POLICIES[policy])
    return placer, placer.place(Demand(1000, 50), Chain(), 100.0)


@pytest.mark.parametrize("times", [0.7, 1.05, 3.0, 50.0])
def test_a_prediction_is_beside_what_came(times):
    beliefs, (placer, placement) = Beliefs(), placed()
    price = placement.chosen.price
    then = 100.0 + times * price.ttft
    beliefs.first(placement, then)
    placer.first(placement, then)
    beliefs.first(placement, then + 1)  # its first token is the first
    placer.emitted(placement, 40)
    beliefs.end(placement, then + times * 40 * price.tpot)
    shown = Shown(beliefs)
    for what in ("ttft", "tpot"):
        assert [shown.count(what, bound) for bound in BUCKETS] == [times <= b for b in BUCKETS]
        assert shown.count(what) == 1
    sums = shown.registry.get_sample_value("motley_route_prediction_ratio_sum", {"what": "tpot"})
    assert sums == pytest.approx(times)


def test_neither_what_never_began_nor_a_few_tokens_tell_a_pace():
    beliefs, (placer, placement) = Beliefs(), placed()
    beliefs.end(placement, 101.0)
    placer.first(placement, 101.0)
    placer.emitted(placement, 3)
    beliefs.end(placement, 102.0)
    placer.end(placement, 102.0)
    beliefs.end(placement, 103.0)
    assert Shown(beliefs).count("tpot") == 0


def test_a_policy_that_predicts_nothing_is_not_judged():
    beliefs, (_, placement) = Beliefs(), placed("least-load")
    beliefs.first(placement, 101.0)
    assert Shown(beliefs).count("ttft") == 0
