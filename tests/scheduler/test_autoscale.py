"""When there is a new plan, and when what runs is kept."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.autoscale import Autoscaler, Seen
from scheduler.errors import SetupError
from scheduler.machines import Machines, whole_time
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.planner_model import Options
from scheduler.problem import price_of
from scheduler.service_file import parse_service
from scheduler.shortfall import unserved

SERVICE = """
[slo]
ttft_ms = 1500
tpot_ms = 120
[[model]]
name = "llama-3.1-8b"
rate = 6
sizes = [{input = 1000, output = 100, weight = 1.0}]
[plan]
gpus = ["L4"]
tp = [1]
"""
MODEL = "llama-3.1-8b"


class Cluster:
    """An autoscaler and machines that do as it says, from the plan for `rate` on."""

    def __init__(self, rate, text=SERVICE, kept=0.99, **changed):
        service = parse_service(text, Path())
        self.service = msgspec.structs.replace(
            service, autoscale=msgspec.structs.replace(service.autoscale, **changed)
        )
        self.mix, self.kept = service.demands[0].workload, kept
        self.autoscaler = Autoscaler(self.service, time.perf_counter)
        problem = self.autoscaler.problem({MODEL: rate})
        self.plan = make_plan(problem, Options(), time.perf_counter)
        columns = {column.name: column for column in problem.columns}
        self.machines = Machines(self.service.autoscale, columns, self.plan.replicas)
        self.start = 0.0

    def window(self, rate):
        """Its decision, once the steps are begun."""
        length = self.service.autoscale.window_s
        spans = self.machines.advance(self.start + length)
        self.start += length
        seen = Seen(
            self.mix.scaled(rate / self.mix.rate)
            if rate
            else msgspec.structs.replace(self.mix, buckets=()),
            round(rate * length),
            self.kept if rate else None,
        )
        decision = self.autoscaler.window({MODEL: seen}, self.machines.running, whole_time(spans))
        self.served = self.machines.ready
        self.machines.carry_out(decision.stages)
        return decision

    def windows(self, rates):
        """The numbers of the windows with another plan."""
        return [at for at, rate in enumerate(rates) if self.window(rate).plan]

    @property
    def replicas(self):
        return Counter(worker.column for worker in self.machines.running)

    def enough_for(self, rate):
        return unserved(self.autoscaler.problem({MODEL: rate}), self.machines.ready) == 0


@settings(max_examples=5, deadline=None)
@given(st.floats(0.5, 30))
def test_a_constant_load_never_switches(rate):
    assert Cluster(rate).windows([rate] * 20) == []


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10_000), st.floats(4, 12))
def test_noise_within_the_band_does_not_flap(seed, rate):
    noise = np.random.default_rng(seed).uniform(0.98, 1.02, 50)
    assert len(Cluster(rate).windows((rate * noise).tolist())) <= 1


@pytest.mark.parametrize("times", [1.6, 3.0])
def test_a_burst_scales_up_within_one_window(times):
    cluster = Cluster(6)
    assert cluster.windows([6] * 8 + [6 * times]) == [8]
    cluster.machines.advance(cluster.start + cluster.service.autoscale.start_s)
    assert cluster.enough_for(6 * times)


def test_down_it_goes_once_when_the_hold_time_is_over():
    cluster = Cluster(12, hold_s=1200.0)
    assert cluster.windows([12] * 8 + [6] * 12) == [8 + 3]
    assert cluster.enough_for(6)
    assert cluster.replicas.total() < Counter(cluster.plan.replicas).total()


def test_a_dip_that_is_shorter_than_the_hold_time_changes_nothing():
    assert Cluster(12, hold_s=1200.0).windows([12] * 8 + [6] * 3 + [12] * 8) == []


def test_a_plan_says_what_routing_wants_of_its_columns():
    cluster = Cluster(6)
    assert cluster.window(6).due == {}
    decision = cluster.window(20)
    due = {name: sum(planned.rates) for name, planned in decision.due.items()}
    first = sum(due[name] for name in decision.plan.replicas if "decode" not in name)
    assert first == pytest.approx(20 * 1.05)


def test_a_saving_that_does_not_pay_for_its_switch_within_the_horizon_is_left():
    dear = {"start_s": 250.0, "drain_s": 250.0}
    assert Cluster(12, horizon_s=36_000.0, hold_s=300.0, **dear).windows([12] * 4 + [9] * 9) == [4]
    assert Cluster(12, horizon_s=60.0, hold_s=300.0, **dear).windows([12] * 4 + [9] * 9) == []


def test_a_miss_that_the_load_does_not_explain_scales_up_until_the_target_is_met():
    cluster = Cluster(6, kept=0.8)
    assert not cluster.enough_for(6 * 1.1**6)
    assert cluster.windows([6] * 6)
    assert cluster.window(6).corrections[MODEL] == pytest.approx(1.1**7)
    assert cluster.enough_for(6 * 1.1**6)
    cluster.kept = 0.99
    after = [cluster.window(6).corrections[MODEL] for _ in range(5)]
    assert after == sorted(after, reverse=True)


def test_a_miss_by_chance_or_for_want_of_machines_is_no_reason_to_trust_them_less():
    by_chance = Cluster(6, kept=0.9 - 0.005)
    assert by_chance.window(6).corrections == {MODEL: 1.0}
    short = Cluster(6, kept=0.3)
    assert short.window(24).corrections == {MODEL: 1.0}


def test_what_is_needed_is_never_nothing():
    cluster = Cluster(6, hold_s=600.0)
    cluster.windows([6] * 3 + [0.0] * 30)
    assert cluster.replicas.total() >= 1
    assert cluster.enough_for(0.01)


def test_a_plan_whose_machines_are_on_their_way_is_let_arrive():
    cluster = Cluster(6, start_s=1000.0)
    assert cluster.windows([6, 6, 12]) == [2]
    reasons = [cluster.window(12).reason for _ in range(3)]
    assert reasons == ["the last plan is on its way"] * 3
    assert cluster.window(40).plan


def test_limits_are_kept_and_said():
    cluster = Cluster(6, SERVICE + '[[limit]]\ngpu = "L4"\ngpus = 8\n')
    reasons = [cluster.window(rate).reason for rate in [6] * 3 + [200] * 9]
    assert reasons[-1] == "the limits leave no room for more"
    assert cluster.replicas.total() == 8


def test_a_spare_is_rented_when_the_load_grows_into_it():
    text = SERVICE + "spare = true\n"
    cluster = Cluster(6, text)
    fits = next(r / 10 for r in range(60, 200) if not cluster.enough_for((r + 1) / 10))
    assert cluster.windows([fits]) == [0]


def test_whole_nodes_are_paid_whole():
    offer = """[[offer]]
gpu = "L4"
price = 0.5
date = 2026-11-01
source = "a round number"
whole = 8
"""
    problem = build(parse_service(SERVICE + offer, Path())).problem
    names = [column.name for column in problem.columns]
    assert [price_of(problem, {names[0]: n}) for n in (0, 1, 8, 9)] == [0, 4, 4, 8]
    assert price_of(problem, dict.fromkeys(names, 3)) == 8


def test_the_mix_of_sizes_moves_the_plan_at_the_same_rate():
    cluster = Cluster(6)
    short_ = cluster.mix
    longer = msgspec.structs.replace(
        short_,
        buckets=(msgspec.structs.replace(short_.buckets[0], name="long", size=(3000.0, 100.0)),),
    )
    assert cluster.windows([6] * 3) == []
    cluster.mix = longer
    assert cluster.windows([6] * 24)
    assert cluster.enough_for(6)


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 1000))
def test_while_it_switches_what_serves_the_load_is_there(seed):
    rng = np.random.default_rng(seed)
    cluster = Cluster(6, hold_s=600.0)
    for rate in (6 * np.exp(np.clip(np.cumsum(rng.normal(0, 0.2, 16)), -1, 1))).tolist():
        decision = cluster.window(rate)
        problem = cluster.autoscaler.problem(decision.need)
        before = unserved(problem, cluster.served)
        for part in range(1, 10):
            cluster.machines.advance(cluster.start + part * 30)
            assert unserved(problem, cluster.machines.ready) <= before + 1e-6
        assert all(step.short == 0 for stage in decision.stages for step in stage)


@pytest.mark.parametrize(
    ("field", "value"),
    [("window_s", 0), ("start_s", -1), ("hold_s", math.nan), ("cover", 1), ("band", -0.1)],
)
def test_settings_that_cannot_be_meant_are_named(field, value):
    text = f"{SERVICE}[autoscale]\n{field} = {value}\n"
    with pytest.raises(SetupError, match=rf"autoscale\.{field}"):
        parse_service(text, Path())


def test_settings_come_from_the_service_file():
    service = parse_service(SERVICE + "[autoscale]\nhold_s = 900\n", Path())
    assert (service.autoscale.hold_s, service.autoscale.cover) == (900, 0.8)
