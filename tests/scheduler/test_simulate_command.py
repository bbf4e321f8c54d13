"""`motley simulate`, as it is typed."""

from __future__ import annotations

import json

import pytest

from motley import main
from scheduler.capacity import Slo
from scheduler.simulate_report import goodput, interval

WORKERS = """
slo = {ttft_ms = 1000, tpot_ms = 60, share = 0.9}
[[worker]]
role = "mixed"
count = 2
kind = "fast"
prefill_tokens_per_s = 9000.0
decode_s_per_token = 0.02
[[worker]]
role = "mixed"
kind = "slow"
cost = {step = 0.05, token = 1e-3, sequence = 1e-3}
"""
TRACE = "arrival_s,input_tokens,output_tokens\n0,400,20\n1,900,5\n2,30,60\n3,1500,1\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "workers.toml").write_text(WORKERS, encoding="utf-8")
    (tmp_path / "trace.csv").write_text(TRACE, encoding="utf-8")
    return ["--workers", f"{tmp_path / 'workers.toml'}", "--trace", f"{tmp_path / 'trace.csv'}"]


def test_a_cluster_is_simulated_at_a_rate(files, capsys):
    assert main(["simulate", *files, "--rate", "4", "--requests", "300", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["workers"]
    (run,) = answer["runs"]
    assert run["requests"] == 300
    assert run["rate"] == pytest.approx(4, rel=0.15)
    assert set(run["kinds"]) == {"fast", "slow"}
    assert run["kinds"]["fast"]["prefilled"] + run["kinds"]["slow"]["prefilled"] == 1
    assert run["kinds"]["fast"]["prefilled"] > 0.7
    assert answer["attainment"]["low"] <= run["attainment"] <= answer["attainment"]["high"]


def test_a_seed_gives_one_answer_and_the_table_says_it(files, capsys):
    said = []
    for seed in ("1", "1", "2"):
        main(["simulate", *files, "--rate", "4", "--requests", "200", "--seed", seed, "--json"])
        said.append(json.loads(capsys.readouterr().out)["workers"]["runs"])
    assert said[0] == said[1] != said[2]
    assert main(["simulate", *files, "--arrivals", "trace", "--requests", "50"]) == 0
    assert "both limits met by" in capsys.readouterr().out


def test_the_fast_form_answers_alike(files, capsys):
    answers = []
    for words in ([], ["--coarse"]):
        main(["simulate", *files, "--rate", "4", "--requests", "500", "--json", *words])
        answers.append(json.loads(capsys.readouterr().out)["workers"]["runs"][0])
    steps, fast = answers
    assert fast["attainment"] == pytest.approx(steps["attainment"], abs=0.05)
    assert fast["ttft_ms"]["p50"] == pytest.approx(steps["ttft_ms"]["p50"], rel=0.1)
    assert fast["events"] < steps["events"]


def test_goodput_is_the_highest_rate_that_holds(files, capsys):
    main(["simulate", *files, "--requests", "300", "--goodput", "40", "--json"])
    best = json.loads(capsys.readouterr().out)["workers"]["goodput"]
    assert 2 < best < 40
    for factor, holds in ((1.0, True), (1.3, False)):
        main(["simulate", *files, "--requests", "300", "--rate", f"{best * factor}", "--json"])
        attained = json.loads(capsys.readouterr().out)["workers"]["attainment"]["mean"]
        assert (attained >= 0.9) is holds


def test_bisection_finds_the_edge():
    assert goodput(lambda rate: 1.0 if rate < 3.3 else 0.0, 0.9, 8.0, 0.01) == pytest.approx(
        3.3, abs=0.01
    )


def test_an_interval_covers_the_spread_of_the_runs():
    calm, wild = interval([0.9] * 4, 500), interval([0.8, 1.0, 0.85, 0.95], 500)
    assert calm.low < 0.9 < calm.high
    assert wild.low < calm.low < calm.high < wild.high


SERVICE = """
[slo]
ttft_ms = 2000
tpot_ms = 80
[[model]]
name = "llama-3.1-8b"
rate = 6
sizes = [{input = 500, output = 100, weight = 0.7}, {input = 2000, output = 20, weight = 0.3}]
[plan]
gpus = ["L4", "A10G"]
"""


def test_a_plan_is_simulated_with_the_profiles_it_was_made_of(tmp_path, capsys):
    pytest.importorskip("scipy", reason="the planner is the extra `plan`")
    service, plan = tmp_path / "service.toml", tmp_path / "plan.json"
    service.write_text(SERVICE, encoding="utf-8")
    main(["plan", f"{service}", "--output", f"{plan}", "--no-certify", "--json"])
    capsys.readouterr()
    command = ["simulate", f"{service}", "--plan", f"{plan}", "--requests", "400", "--json"]
    assert main(command) == 0
    (answer,) = json.loads(capsys.readouterr().out).values()
    replicas = json.loads(plan.read_text())["replicas"]
    assert {k: v["workers"] for k, v in answer["runs"][0]["kinds"].items()} == replicas
    assert answer["slo"] == {"ttft_ms": 2000, "tpot_ms": 80, "share": Slo(1, 1).share}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to simulate"),
        (["--workers", "W"], "--trace"),
        (["--workers", "W", "--trace", "T", "--rate", "-1"], "--rate"),
        (["--workers", "W", "--trace", "T", "--rate", "nan"], "--rate"),
        (["--workers", "W", "--trace", "T", "--arrivals", "often"], "often"),
        (["service.toml"], "--plan"),
    ],
)
def test_what_is_missing_is_said(files, capsys, arguments, said):
    given = {"W": files[1], "T": files[3]}
    assert main(["simulate", *(given.get(word, word) for word in arguments)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("slo = 1", "slo"),
        (WORKERS.replace("step = 0.05", "step = -1"), "cost.step"),
        (WORKERS.replace("decode_s_per_token = 0.02", ""), "worker[0]"),
        (WORKERS + "colour = 1", "colour"),
    ],
)
def test_a_workers_file_that_cannot_be_meant_names_the_field(files, tmp_path, capsys, wrong, said):
    (tmp_path / "workers.toml").write_text(wrong, encoding="utf-8")
    assert main(["simulate", *files]) == 2
    assert said in capsys.readouterr().err
