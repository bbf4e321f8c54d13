"""Step times from aiconfigurator-core: an extra, asked for by the service, never by itself."""

from __future__ import annotations

import time
from importlib.util import find_spec

import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.aiconfigurator import PACKAGE, table_profile
from scheduler.errors import SetupError
from scheduler.plan import violations
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.service_file import parse_service

LLAMA = "meta-llama/Meta-Llama-3.1-8B"
SERVICE = f"""
slo = {{ttft_ms = 500, tpot_ms = 30}}
[[model]]
name = "llama-3.1-8b"
rate = 10
sizes = [{{input = 1000, output = 200, weight = 1}}]
[[aiconfigurator]]
path = "{LLAMA}"
[plan]
gpus = ["H100", "L4"]
"""
here = find_spec(PACKAGE) is not None
installed = pytest.mark.skipif(not here, reason="the extra `aiconfigurator` is not installed")


@pytest.mark.skipif(here, reason="the extra `aiconfigurator` is installed")
def test_a_service_that_asks_for_it_is_told_what_to_install(tmp_path):
    with pytest.raises(SetupError, match=r"pip install 'motley\[aiconfigurator\]'"):
        parse_service(SERVICE, tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        f'[[aiconfigurator]]\npath = "{LLAMA}"\nmodel = "other"\n',
        f'[[aiconfigurator]]\npath = "{LLAMA}"\nbackend = "ollama"\n',
        "[[aiconfigurator]]\n",
    ],
)
def test_what_is_wrong_is_named(tmp_path, table):
    text = SERVICE.replace(f'[[aiconfigurator]]\npath = "{LLAMA}"\n', table)
    with pytest.raises(SetupError, match="aiconfigurator"):
        parse_service(text, tmp_path)


@installed
def test_a_model_that_it_does_not_ship_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(SetupError, match=r"aiconfigurator\[0\]\.path.*Meta-Llama-3\.1-8B"):
        parse_service(SERVICE.replace(LLAMA, "nobody/nothing"), tmp_path)


@installed
def test_times_are_those_of_its_tables():
    one, two = (table_profile(LLAMA, "H100", tp, "vllm") for tp in (1, 2))
    assert one.provenance == "measured"
    assert one.source.startswith("aiconfigurator-core 0.12")
    # Release 0.12.0 says 22.1 ms and 7.5 ms of vLLM 0.24.0.
    assert one.prefill_ms(1024, 1024**2) == pytest.approx(22.1, rel=0.1)
    assert one.decode_ms(16, 16 * 1024) == pytest.approx(7.5, rel=0.1)
    assert two.prefill_ms(1024, 1024**2) < one.prefill_ms(1024, 1024**2)
    assert one.prefill_ms(2048, 2 * 1024**2) > one.prefill_ms(1024, 1024**2)  # two prompts


@installed
def test_there_is_none_of_what_it_has_not_measured():
    assert table_profile(LLAMA, "L4", 1, "vllm") is None
    assert table_profile("meta-llama/Meta-Llama-3.1-70B", "H100", 3, "vllm") is None


@installed
def test_a_plan_takes_them_before_the_roofline_and_looks_at_the_memory_itself(tmp_path):
    service = parse_service(SERVICE, tmp_path)
    built = build(service)
    facts = {column.name: built.facts[column.name] for column in built.problem.columns}
    for name, each in facts.items():
        assert each.source.startswith("aiconfigurator" if "H100" in name else "roofline"), name
    plan = make_plan(built.problem, built.options, time.perf_counter)
    assert violations(built.problem, plan) == []
    large = SERVICE.replace("llama-3.1-8b", "llama-3.1-70b").replace("3.1-8B", "3.1-70B")
    columns = build(parse_service(large, tmp_path)).problem.columns
    # 141 GB of weights: no H100 alone, whatever the tables say of its speed.
    assert {column.gpus for column in columns if column.gpu == "H100"} <= {2, 4, 8}
