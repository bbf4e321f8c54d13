"""From a service file to a plan and its reasons."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.errors import SetupError
from scheduler.explain import explain
from scheduler.plan import violations
from scheduler.plan_report import explanation_lines
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.service_file import parse_service

TRACES = Path(__file__).parents[2] / "loadtest" / "traces"
SLO = "[slo]\nttft_ms = 1000\ntpot_ms = 60\n"
LLAMA = '[[model]]\nname = "llama-3.1-8b"\n'
SIZES = "sizes = [{input = 500, output = 100, weight = 1}]\n"
SERVED = SLO + LLAMA + "rate = 1\n" + SIZES
TWICE = "sizes = [{input = 5, output = 1, weight = 0.5}, {input = 5, output = 1, weight = 0.5}]\n"
OFFER = '[[offer]]\ngpu = "L4"\ndate = 2026-11-01\nsource = "s"\n'
STEP = (
    '[[step]]\nmodel = "q"\ngpu = "L4"\ntp = 1\nprefill = [1, 1, 0]\ndecode = [5, 0, 0]\n'
    'provenance = "measured"\nsource = "s"\n'
)
SHAPE = (
    '[[shape]]\nname = "q"\nparameters = 1e6\nlayers = 2\nhidden = 8\nheads = 2\nkv_heads = 2\n'
    "head_dim = 4\ncontext = 64\n"
)
GPUS = 'gpus = ["L4", "A10G", "A100-80GB"]\n'


def planned(text, folder=TRACES, **previous):
    service = parse_service(text, folder)
    built = build(service, **previous)
    plan = make_plan(built.problem, built.options, time.perf_counter)
    assert violations(built.problem, plan) == []
    return service, built, plan


def test_a_trace_with_catalogue_prices_is_planned_within_its_slo():
    text = SLO + LLAMA + 'trace = "azure2023_conv_0_1200s.csv"\n[plan]\n' + GPUS
    _, built, plan = planned(text)
    assert plan.status == "optimal"
    assert plan.cost > 0
    assert sum(b.rate for b in built.problem.buckets) == pytest.approx(5985 / 1200, rel=0.01)
    assert {facts.provenance for facts in built.facts.values()} == {"modelled"}


def test_head_room_and_spares_cost_something():
    text = SLO + LLAMA + "rate = 20\n" + SIZES + "[plan]\n" + GPUS
    bare = planned(text + "head_room = false\n")[2].cost
    roomy = planned(text)[2].cost
    spared = planned(text + "spare = true\n")[2].cost
    assert bare < roomy < spared


def test_a_shard_that_does_not_fit_is_no_column():
    text = SLO + '[[model]]\nname = "llama-3.1-70b"\nrate = 1\n' + SIZES
    built = build(parse_service(text + '[plan]\ngpus = ["A100-80GB", "L4"]\n', TRACES))
    degrees = {(column.gpu, column.gpus) for column in built.problem.columns}
    # 141 GB of weights in 90 % of the memory: two A100, or eight L4.
    assert degrees == {("A100-80GB", 2), ("A100-80GB", 4), ("A100-80GB", 8), ("L4", 8)}


def test_prices_hardware_and_steps_of_the_file_go_first():
    own = (
        '[[offer]]\ngpu = "L4"\nprice = 0.5\ndate = 2026-11-01\nsource = "our contract"\n'
        '[[step]]\nmodel = "llama-3.1-8b"\ngpu = "L4"\ntp = 1\nprefill = [20, 0.2, 0]\n'
        'decode = [60.5, 0, 0]\nprovenance = "measured"\nsource = "our bench"\n'
    )
    text = SLO + LLAMA + "rate = 2\n" + SIZES + own + '[plan]\ngpus = ["L4"]\ntp = [1]\n'
    _, built, plan = planned(text)
    assert {column.role for column in built.problem.columns} == {"prefill"}  # 60.5 ms is too slow
    assert built.facts["llama-3.1-8b prefill L4 x1"].provenance == "measured"
    assert built.problem.columns[0].price == 0.5
    assert plan.status == "partial"


def test_markets_regions_and_whole_nodes():
    offers = "".join(
        f'[[offer]]\ngpu = "H100"\nprice = {price}\ndate = 2026-11-01\nsource = "s"\n{other}\n'
        for price, other in (
            (4, 'region = "eu"\nwhole = 8'),
            (2, 'region = "us"\nmarket = "spot"'),
        )
    )
    text = SLO + LLAMA + "rate = 30\n" + SIZES + offers
    text += '[plan]\ngpus = ["H100"]\ntp = [1]\nroles = ["mixed"]\nhead_room = false\n'
    cheap = planned(text)[2]
    assert all("spot us" in name for name in cheap.replicas)
    _, built, mixed = planned(text + "on_demand = 1.0\n[[limit]]\ngpu = 'H100'\ngpus = 8\n")
    assert mixed.cost == pytest.approx(min(32, 7.516 * sum(mixed.replicas.values())), abs=0.01)
    assert len(built.problem.nodes) == 1


def test_explains_what_binds_and_what_would_suffice():
    text = SLO + LLAMA + "rate = 40\n" + SIZES + '[[limit]]\ngpu = "L4"\ngpus = 3\n'
    service, built, plan = planned(text + '[plan]\ngpus = ["L4"]\n')
    why = explain(service, built, plan, time.perf_counter)
    assert plan.status == "partial"
    assert [(each.limit, each.used, each.gpus) for each in why.binding] == [("L4", 3, 3)]
    assert why.binding[0].served > 0
    more = why.suffices.gpus["L4"]
    enough = text.replace("gpus = 3", f"gpus = {3 + more}") + '[plan]\ngpus = ["L4"]\n'
    assert planned(enough)[2].shed == {}
    assert 0 < why.suffices.rate < 1
    slower = text.replace("rate = 40", f"rate = {40 * why.suffices.rate}")
    assert planned(slower + '[plan]\ngpus = ["L4"]\n')[2].shed == {}
    assert not why.suffices.relaxed  # what is short are GPUs
    said = "\n".join(explanation_lines(why, plan))
    assert "L4: 3 of 3 GPUs used" in said
    assert f"{more} more L4" in said


def test_explains_which_slo_would_serve_what_nothing_can():
    sizes = "sizes = [{input = 100, output = 50, weight = 0.5}, "
    sizes += "{input = 6000, output = 50, weight = 0.5}]\n"
    slo = SLO.replace("1000", "300").replace("= 60", "= 120")
    text = slo + LLAMA + "rate = 2\n" + sizes + '[plan]\ngpus = ["L4"]\n'
    service, built, plan = planned(text + "tp = [1]\n")
    why = explain(service, built, plan, time.perf_counter)
    assert plan.shed == {"6000/50": 1.0}
    (missing,) = why.unserved
    assert missing.bucket == "llama-3.1-8b/6000/50"
    assert missing.ttft_ms > 300
    relaxed = text.replace("ttft_ms = 300", f"ttft_ms = {missing.ttft_ms}")
    relaxed = relaxed.replace("tpot_ms = 120", f"tpot_ms = {max(120, missing.tpot_ms)}")
    assert planned(relaxed + "tp = [1]\n")[2].shed == {}


def test_each_way_to_serve_all_does_and_the_cheapest_is_named():
    text = SLO + LLAMA + "rate = 8\n" + SIZES + '[plan]\ngpus = ["L4", "A10G"]\ntp = [1]\n'
    text += '[[limit]]\ngpu = "L4"\ngpus = 6\n[[limit]]\ngpu = "A10G"\ngpus = 1\n'
    service, built, plan = planned(text)
    assert plan.shed
    why = explain(service, built, plan, time.perf_counter)
    (way,) = why.suffices.relaxed
    assert way.limits == ("TPOT",)  # time for the first token is not what is short
    assert planned(text.replace("= 60", f"= {way.tpot_ms}"))[2].shed == {}
    assert planned(text.replace("= 60", f"= {way.tpot_ms * 0.9}"))[2].shed
    more = text.replace("gpus = 1\n", f"gpus = {1 + why.suffices.gpus['A10G']}\n")
    assert planned(more)[2].cost == pytest.approx(why.suffices.cost, rel=0.01)
    (first,) = [line for line in explanation_lines(why, plan) if "the cheapest" in line]
    assert f"{min(way.cost, why.suffices.cost):.2f} $/h" in first


def test_a_looser_slo_saves_and_its_price_is_told():
    text = SLO.replace("= 60", "= 45") + LLAMA + "rate = 30\n" + SIZES
    service, built, plan = planned(text + '[plan]\ngpus = ["L4", "A10G"]\ntp = [1]\n')
    why = explain(service, built, plan, time.perf_counter)
    tighter, tpot = (each for each in why.slo if each.limit == "TPOT")
    assert (tighter.to, tpot.to) == pytest.approx((40.5, 49.5))
    assert tighter.served < 0 == tpot.served  # 40 ms are too few for any of these
    assert tpot.more < 0
    half, twice = (each for each in why.slo if each.limit == "share")
    assert (half.to, twice.to) == pytest.approx((0.95, 0.8))
    assert half.more >= 0 >= twice.more
    said = "\n".join(explanation_lines(why, plan))
    assert f"TPOT 50 ms saves {-tpot.more:.2f} $/h" in said
    assert tpot.at == 45
    assert why.mixed_only is not None
    assert min(cost for cost in why.one_gpu.values() if cost is not None) >= plan.cost - 1e-6


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "slo"),
        ("[slo", "table declaration"),
        (SLO, "model"),
        (SLO + "x = 1\n" + LLAMA, "`x`"),
        (SLO + LLAMA + SIZES, "model[0].rate"),
        (SLO + LLAMA + "rate = -2\n" + SIZES, "model[0].rate"),
        (SLO + LLAMA + "rate = nan\n" + SIZES, "model[0].rate"),
        (SLO + LLAMA + "rate = 1\n", "trace, sizes, lognormal"),
        (SLO + LLAMA + "rate = 1\n" + SIZES.replace("weight = 1", "weight = 0.9"), "weights sum"),
        (SLO + LLAMA + "rate = 1\n" + SIZES.replace("500", "-500"), "model[0].sizes[0].input"),
        (SLO + LLAMA + "rate = 1\n" + SIZES.replace("500", "1e12"), "model[0].sizes[0].input"),
        (SLO + LLAMA + "rate = 1e300\n" + SIZES, "model[0].rate"),
        (SLO + LLAMA + "rate = 1\n" + TWICE, "model[0].sizes[1]"),
        (SERVED + "[plan]\ntp = []\n", "plan.tp"),
        (SERVED + '[plan]\nroles = ["prefill"]\n', "plan.roles"),
        (SERVED + "[plan]\ngap = nan\n", "plan.gap"),
        (SERVED + "[plan]\nswitching = -1\n", "plan.switching"),
        (SERVED + '[plan]\ncertify = ["chaos"]\n', "plan.certify"),
        (SERVED + '[[limit]]\ngpu = "L4"\ngpus = 1\nmarket = "moon"\n', "limit[0].market"),
        (SERVED + OFFER + "price = nan\n", "offer[0].price"),
        (SERVED + OFFER + "price = 1\nwhole = -8\n", "offer[0].whole"),
        (SERVED + STEP.replace("[1, 1, 0]", "[-1, 1, 0]"), "step[0].prefill"),
        (SERVED + STEP.replace("[5, 0, 0]", "[0, 0, 0]"), "step[0].decode"),
        (SERVED + STEP.replace("L4", "Z80"), "step[0].gpu"),
        (SERVED + SHAPE.replace("layers = 2", "layers = 0"), "shape.q.layers"),
        (SERVED + SHAPE.replace("1e6", "nan"), "shape.q.parameters"),
        (SLO + LLAMA + 'trace = "nowhere.csv"\n', "nowhere.csv"),
        (SLO + '[[model]]\nname = "gpt-9"\nrate = 1\n' + SIZES, "gpt-9"),
        (SLO + (LLAMA + "rate = 1\n" + SIZES) * 2, "twice"),
        (SLO.replace("1000", "0") + LLAMA + "rate = 1\n" + SIZES, "slo.ttft_ms"),
        (SLO + "share = 2\n" + LLAMA + "rate = 1\n" + SIZES, "slo.share"),
        (SLO + LLAMA + "rate = 1\n" + SIZES + '[plan]\ngpus = ["Z80"]\n', "plan.gpus"),
        (SLO + LLAMA + "rate = 1\n" + SIZES + "[plan]\non_demand = 2\n", "plan.on_demand"),
        (SLO + LLAMA + "rate = 1\n" + SIZES + '[[limit]]\ngpu = "Z80"\ngpus = 1\n', "limit[0].gpu"),
        (
            SLO + LLAMA + "rate = 1\n" + SIZES + '[[profile]]\nfile = "p.json"\nformat = "vllm"\n'
            'model = "other"\ngpu = "L4"\n',
            "profile[0].model",
        ),
    ],
)
def test_what_is_wrong_is_named(text, named):
    with pytest.raises(SetupError) as caught:
        parse_service(text, TRACES)
    assert named in str(caught.value)


def test_an_empty_trace_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n")
    with pytest.raises(SetupError, match=r"t\.csv: no requests"):
        parse_service(SLO + LLAMA + 'trace = "t.csv"\n', tmp_path)


def test_a_lognormal_has_its_means():
    shape = "{input_mean = 800, input_sd = 500, output_mean = 200, output_sd = 200}"
    service = parse_service(SLO + LLAMA + f"rate = 7\nlognormal = {shape}\n", TRACES)
    workload = service.demands[0].workload
    assert workload.rate == pytest.approx(7)
    mean = sum(bucket.rate * bucket.size[0] for bucket in workload.buckets) / 7
    assert mean == pytest.approx(800, rel=0.03)


def test_a_benchmark_file_goes_before_the_roofline(tmp_path):
    (tmp_path / "p.json").write_text('{"L4": {"tputs": [[2, 1], [1, 0.5]]}}')
    text = SLO + LLAMA + "rate = 2\n" + SIZES
    text += '[[profile]]\nfile = "p.json"\nformat = "melange"\nmodel = "llama-3.1-8b"\ngpu = "L4"\n'
    text += "input_edges = [100, 300]\noutput_edges = [50, 200]\n"
    text += '[plan]\ngpus = ["L4"]\ntp = [1]\nroles = ["mixed"]\n'
    _, built, _ = planned(text, tmp_path)
    facts = built.facts["llama-3.1-8b mixed L4 x1"]
    assert (facts.provenance, facts.source) == ("measured", "p.json")
    assert facts.extrapolated == ("500/100",)


def test_a_plan_says_that_a_fit_is_one(tmp_path):
    run = {"completed": 9, "total_input_tokens": 4500, "total_output_tokens": 900}
    run |= {"request_throughput": 3.0, "mean_ttft_ms": 9.0, "mean_tpot_ms": 9.0}
    (tmp_path / "p.json").write_text(json.dumps(run))
    text = SERVED + '[[profile]]\nfile = "p.json"\nformat = "vllm"\nmodel = "llama-3.1-8b"\n'
    text += 'gpu = "L4"\n[plan]\ngpus = ["L4"]\ntp = [1]\nroles = ["mixed"]\n'
    facts = planned(text, tmp_path)[1].facts["llama-3.1-8b mixed L4 x1"]
    assert (facts.provenance, facts.source) == ("assumed", "p.json, one size")
