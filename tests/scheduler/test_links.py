"""Links: how fast each is, from the KV caches that crossed it and from one that does not arrive."""

from __future__ import annotations

import pytest

from scheduler.cost import CostModel
from scheduler.fleet import Fleet, Worker
from scheduler.links import FORGET_S, LEAST_BYTES, Link
from scheduler.messages import Address, Role
from scheduler.placing import Chain, Placer
from scheduler.policies import POLICIES
from scheduler.pricing import Demand

MB = 1e6
ASSUMED = 1e9

TRANSFERS = {
    "nothing is known: what is assumed": ([], 1.0, ASSUMED),
    "one transfer": ([(10 * MB, 1.0, 0.0)], 1.0, 10 * MB),
    "a faster link than was assumed": ([(10 * MB, 0.001, 0.0)], 1.0, 10e9),
    "the newest counts most": ([(10 * MB, 1.0, 0.0), (10 * MB, 9.0, 1.0)], 2.0, 2 * MB),
    "large and small alike": ([(1 * MB, 1.0, 0.0), (100 * MB, 100 / 3, 1.0)], 2.0, 1.5 * MB),
    "a few bytes tell of delays only": ([(LEAST_BYTES - 1, 1.0, 0.0)], 1.0, ASSUMED),
    "a worker that does not say how long": ([(10 * MB, 0.0, 0.0)], 1.0, ASSUMED),
    "long ago": ([(10 * MB, 1.0, 0.0)], FORGET_S, ASSUMED),
    "what was forgotten counts no more": (
        [(10 * MB, 1.0, 0.0), (10 * MB, 0.1, FORGET_S)],
        FORGET_S + 1,
        100 * MB,
    ),
}


@pytest.mark.parametrize(("transfers", "now", "rate"), TRANSFERS.values(), ids=TRANSFERS)
def test_a_rate_is_learned(transfers, now, rate):
    link = Link()
    for size, seconds, when in transfers:
        link.learn(size, seconds, when)
    assert link.rate(ASSUMED, 0.0, now) == pytest.approx(rate)


def test_a_link_on_which_nothing_arrives_is_no_faster_than_that():
    link = Link()
    link.begin(10.0)
    assert link.rate(ASSUMED, 5 * MB, 10.0) == ASSUMED
    assert link.rate(ASSUMED, 5 * MB, 15.0) == 1 * MB
    link.begin(15.0)
    assert link.rate(ASSUMED, 10 * MB, 20.0) == 1 * MB
    link.end(20.0)
    assert link.rate(ASSUMED, 5 * MB, 20.0) == ASSUMED
    assert link.rate(ASSUMED, 5 * MB, 25.0) == 1 * MB
    link.end(25.0)
    assert link.rate(ASSUMED, 0.0, 99.0) == ASSUMED


# A prompt token takes 1 ms, a lone decode 11 ms, a token's KV 1 ms at the rate that is assumed.
COST = CostModel(0.0, 0.001, 0.0, 0.011, 0.0, "measured", 1e5, 1e8)
DEMAND = Demand(100, 50)


def split_pool() -> tuple[Placer, list[Worker]]:
    """A prefill worker, and two decode workers whose own prompts are slow."""
    fleet = Fleet()
    for name, role in (("p", Role.PREFILL), ("a", Role.DECODE), ("b", Role.DECODE)):
        factor = 1.0 if role is Role.PREFILL else 20.0
        cost = COST.with_coefficients([0.0, factor * 0.001, 0.0, 0.011, 0.0])
        fleet.add(Worker(name, role, Address("h", 1), cost, overlaps=True))
    return Placer(fleet, lambda: 0.5, POLICIES["priced"]), list(fleet)


def test_a_slow_link_is_avoided_once_a_transfer_has_shown_it():
    it, _ = split_pool()
    first = it.place(DEMAND, Chain(), 0.0)
    assert (first.prefill.name, first.decode.name) == ("p", "a")
    it.first(first, 0.1)
    it.arrived(first, 10.1, first.bytes, 10.0)
    it.end(first, 10.2)
    second = it.place(DEMAND, Chain(), 11.0)
    assert (second.prefill.name, second.decode.name) == ("p", "b")
    it.end(second, 12.0)
    again = it.place(DEMAND, Chain(), 11.0 + FORGET_S)
    assert again.decode.name == "a", "it may be better by now"


def test_and_while_the_first_transfer_is_still_on_it():
    it, _ = split_pool()
    first = it.place(DEMAND, Chain(), 0.0)
    it.first(first, 0.1)
    it.emitted(first, 1)
    second = it.place(DEMAND, Chain(), 8.0)
    assert (first.decode.name, second.decode.name) == ("a", "b")


def test_where_every_link_is_slow_prompts_are_not_handed_over():
    it, (p, a, b) = split_pool()
    for other in (a, b):
        p.links.setdefault(other.name, Link()).learn(10 * MB, 10.0, 0.0)
    route = it.place(DEMAND, Chain(), 1.0)
    assert not route.split


def test_a_worker_that_is_gone_leaves_no_link_behind():
    it, (p, a, _) = split_pool()
    p.links[a.name] = Link()
    it.fleet.remove(a.name)
    assert p.links == {}
