"""`motley plan`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from motley import main

PROBLEM = {
    "buckets": [
        {"name": "short", "model": "m", "rate": 3},
        {"name": "long", "model": "m", "rate": 1},
    ],
    "columns": [
        {
            "name": "on L4",
            "model": "m",
            "gpu": "L4",
            "gpus": 1,
            "role": "mixed",
            "price": 0.7,
            "capacity": {"short": 2},
        }
    ],
    "limits": {"L4": 4},
}
SERVICE = """
[slo]
ttft_ms = 1000
tpot_ms = 60
[[model]]
name = "llama-3.1-8b"
rate = 10
sizes = [{input = 500, output = 100, weight = 1}]
[plan]
gpus = ["L4", "A10G"]
"""


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(PROBLEM))
    return str(path)


@pytest.fixture
def service(tmp_path):
    path = tmp_path / "service.toml"
    path.write_text(SERVICE)
    return str(path)


def test_a_problem_file_gives_the_fields_that_are_promised(problem, capfd):
    assert main(["plan", "--problem", problem, "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert {"status", "cost", "replicas", "routing", "gap", "seconds"} <= set(plan)
    assert plan["replicas"] == {"on L4": 2}
    assert plan["routing"] == {"short": {"on L4": 1.0}, "long": {}}
    assert (plan["status"], plan["shed"]) == ("partial", {"long": 1.0})


def test_a_person_reads_a_table(problem, capfd):
    assert main(["plan", "--problem", problem]) == 0
    shown = capfd.readouterr().out
    assert "1.40 $/h" in shown
    assert "shed: 100.0% of long" in shown


def test_a_plan_names_its_sources_and_is_taken_back_as_what_runs(service, tmp_path, capfd):
    output = str(tmp_path / "plan.json")
    assert main(["plan", service, "--no-certify", "--json", "--output", output]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan == json.loads((tmp_path / "plan.json").read_text())
    assert plan["certified"] is False
    assert set(plan["columns"]) == set(plan["replicas"])
    for column in plan["columns"].values():
        assert column["provenance"] == "modelled"
        assert column["role"] in ("mixed", "prefill", "decode")
    assert main(["plan", service, "--no-certify", "--previous", output, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["replicas"] == plan["replicas"]


def test_a_plan_is_certified_unless_told_otherwise(service, capfd):
    assert main(["plan", service, "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["certified"] is True
    ((process, held),) = plan["certificate"]["attainment"]["llama-3.1-8b"].items()
    assert process == "poisson"
    assert held["low"] > 0.9
    assert plan["certificate"]["premium"] >= 0


def test_a_plan_too_large_to_simulate_says_so(service, capfd):
    path = Path(service)
    path.write_text(SERVICE.replace("rate = 10", "rate = 1e6") + "head_room = false\n")
    assert main(["plan", service, "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["certified"] is False
    assert "are not simulated" in plan["certificate"]["reason"]


def test_explain_is_part_of_the_answer(service, capfd):
    assert main(["plan", service, "--no-certify", "--explain", "--json"]) == 0
    why = json.loads(capfd.readouterr().out)["explanation"]
    assert set(why["one_gpu"]) == {"L4", "A10G"}
    assert main(["plan", service, "--no-certify", "--explain"]) == 0
    assert "no limit binds" in capfd.readouterr().out


def test_goodput_tells_both_attainments(capfd):
    arguments = ["plan", "--goodput", "--runs", "2", "--gpus", "3", "--rate", "30"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert set(answer["placements"][0]["attained"]) == {"ttft", "tpot", "joint"}
    assert answer["replicas"] >= 1
    assert main(arguments) == 0
    assert "such pairs" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "SERVICE.toml"),
        (["--goodput", "--problem", "x.json"], "SERVICE.toml"),
        (["--problem", "nowhere.json"], "nowhere.json"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--goodput", "--slices", "0"], "--slices"),
        (["--goodput", "--gap", "1"], "--gap"),
        (["--goodput", "--time-limit", "0"], "--time-limit"),
    ],
)
def test_what_is_missing_is_said(arguments, named, capfd):
    assert main(["plan", *arguments]) == 2
    assert named in capfd.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rate = 10", "rate = -10", "model[0].rate"),
        ("rate = 10", "rate = nan", "model[0].rate"),
        ('"A10G"', '"Z80"', "plan.gpus"),
        ("weight = 1", "weight = 0.9", "model[0].sizes"),
        (
            "rate = 10\nsizes = [{input = 500, output = 100, weight = 1}]",
            'trace = "t.csv"',
            "t.csv",
        ),
        ("ttft_ms = 1000", "ttft_ms = 0", "slo.ttft_ms"),
    ],
)
def test_what_is_wrong_with_a_service_is_the_operators_to_mend(service, capfd, old, new, named):
    path = Path(service)
    (path.parent / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n")
    path.write_text(SERVICE.replace(old, new))
    assert main(["plan", service]) == 2
    said = capfd.readouterr().err
    assert named in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("buckets", 0, "rate"), -1, "buckets[0].rate"),
        (("buckets", 0, "rate"), float("nan"), "buckets[0].rate"),
        (("columns", 0, "capacity"), {"short": 0}, "columns[0].capacity.short"),
        (("limits",), {"Z80": 4}, "limits.Z80"),
        (("buckets",), [], "buckets"),
    ],
)
def test_what_is_wrong_with_a_problem_is_the_operators_to_mend(
    changed, problem, capfd, path, value, named
):
    Path(problem).write_text(changed(PROBLEM, path, value))
    assert main(["plan", "--problem", problem, "--json"]) == 2
    said = capfd.readouterr()
    assert named in said.err
    assert (said.out, "Traceback" in said.err) == ("", False)


def test_a_bucket_that_nothing_can_serve_is_shed_by_name(service, capfd):
    sizes = "[{input = 500, output = 100, weight = 0.5}, {input = 90000, output = 9, weight = 0.5}]"
    path = Path(service)
    path.write_text(SERVICE.replace("[{input = 500, output = 100, weight = 1}]", sizes))
    assert main(["plan", service, "--no-certify", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert (plan["status"], plan["shed"]) == ("partial", {"90000/9": 1.0})


def test_an_output_that_cannot_be_written_is_named(problem, capfd):
    assert main(["plan", "--problem", problem, "--output", "/nowhere/plan.json"]) == 2
    assert "/nowhere/plan.json" in capfd.readouterr().err


def test_a_previous_plan_that_is_none_is_named(service, problem, capfd):
    assert main(["plan", service, "--previous", problem]) == 2
    assert "--previous" in capfd.readouterr().err
