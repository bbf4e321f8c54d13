"""Certification: what is promised of a plan holds when it is simulated anew."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.certify import Certifier, Tightened, processes, requests_of, tighten
from scheduler.errors import SetupError
from scheduler.messages import Role
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.service_file import parse_service

SERVICE = """
[slo]
ttft_ms = 1500
tpot_ms = 120
share = 0.96
[[model]]
name = "llama-3.1-8b"
rate = 6
sizes = [{input = 1500, output = 20, weight = 0.8}, {input = 200, output = 60, weight = 0.2}]
[plan]
gpus = ["L4"]
tp = [1]
head_room = false
"""
FRESH = range(1000, 1010)


def certifier(text: str) -> Certifier:
    service = parse_service(text, Path())
    return Certifier(service, build(service), time.perf_counter, np.random.default_rng)


def first_plan(certifier: Certifier):
    return make_plan(certifier.built.problem, certifier.built.options, time.perf_counter)


@pytest.fixture(scope="module")
def tightened():
    """A plan without any head-room, before and after."""
    made = certifier(SERVICE)
    first = first_plan(made)
    return made, first, *made.certify(first)


def attaining(certifier, plan, seeds=FRESH) -> list[int]:
    share = certifier.service.demands[0].slo.share
    return [
        sum(run.both >= share for run in runs)
        for by_process in certifier.simulate(plan, seeds).values()
        for runs in by_process.values()
    ]


def test_a_plan_that_misses_its_slo_is_tightened_until_it_holds(tightened):
    made, first, plan, certificate = tightened
    assert certificate.certified
    assert certificate.rounds > 1
    assert max(attaining(made, first, range(1000, 1003))) < 3
    assert min(attaining(made, plan)) >= 9


def test_the_premium_is_what_it_costs_above_the_first_plan(tightened):
    _, first, plan, certificate = tightened
    assert plan.cost > first.cost
    assert certificate.premium == pytest.approx(plan.cost / first.cost - 1)


def test_a_plan_that_holds_is_left_as_it_is(tightened):
    made, _, plan, _ = tightened
    again, certificate = made.certify(plan)
    assert again == plan
    assert (certificate.certified, certificate.premium, certificate.rounds) == (True, 0.0, 1)


def test_limits_without_room_to_tighten_give_no_certificate_but_the_first_plan():
    count = first_plan(certifier(SERVICE)).replicas
    gpus = sum(count.values())
    made = certifier(SERVICE + f'[[limit]]\ngpu = "L4"\ngpus = {gpus}\n')
    first = first_plan(made)
    plan, certificate = made.certify(first)
    assert plan == first
    assert not certificate.certified
    assert "limits" in certificate.reason
    (held,) = certificate.attainment["llama-3.1-8b"].values()
    assert held.mean < 0.96


def test_a_plan_that_sheds_is_not_certified():
    made = certifier(SERVICE + '[[limit]]\ngpu = "L4"\ngpus = 1\n')
    _, certificate = made.certify(first_plan(made))
    assert (certificate.certified, certificate.reason) == (False, "it sheds load")


def test_each_phase_is_tightened_by_its_own_factor():
    made = certifier(SERVICE)
    factors = {"llama-3.1-8b": Tightened(prefill=2.0, decode=1.25)}
    for before, after in zip(
        made.built.problem.columns, tighten(made.built.problem, factors).columns, strict=True
    ):
        factor = {Role.PREFILL: 2.0, Role.MIXED: 2.0, Role.DECODE: 1.25}[before.role]
        for field in ("capacity", "link"):
            less = {name: rate / factor for name, rate in getattr(before, field).items()}
            assert getattr(after, field) == pytest.approx(less)


def test_a_trace_is_run_once_through_and_others_as_asked(tmp_path):
    rows = "\n".join(f"{at * 0.3},400,20" for at in range(2000))
    (tmp_path / "t.csv").write_text(f"arrival_s,input_tokens,output_tokens\n{rows}\n")
    text = SERVICE.replace(SERVICE[SERVICE.index("sizes =") : SERVICE.index("[plan]")], "")
    text = text.replace("rate = 6", 'trace = "t.csv"')
    service = parse_service(text, tmp_path)
    (demand,) = service.demands
    assert processes(service, demand) == ("poisson", "trace")
    assert requests_of(demand, "trace") == 2000
    asked = parse_service(text + 'certify = ["gamma:2"]\n', tmp_path)
    assert processes(asked, asked.demands[0]) == ("gamma:2",)


@pytest.mark.parametrize("process", ["often", "trace"])
def test_a_process_that_cannot_be_simulated_is_named(process):
    with pytest.raises(SetupError, match=process):
        parse_service(SERVICE + f'certify = ["{process}"]\n', Path())
