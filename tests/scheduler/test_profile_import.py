"""Others' files: what they say is taken over exactly, what they do not say is marked."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("numpy", reason="the planner is the extra `plan`")

from scheduler.capacity import Slo
from scheduler.errors import SetupError
from scheduler.profile_import import read_profile

SLO = Slo(ttft_ms=500, tpot_ms=50, share=0.9)


def read(tmp_path, content, form, gpu="A10G", edges=None):
    path = tmp_path / "profile.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_profile(path, form, gpu, SLO, edges)


MELANGE = {"A10G": {"cost": 1.01, "tputs": [[2, 1], [5, 2]]}}
EDGES = ((100.0, 400.0), (50.0, 200.0))
AIBRIX = {"gpu": "x", "cost": 1, "tputs": [[2, 5], [1, 2]], "indexes": [[50, 200], [100, 400]]}


@pytest.mark.parametrize(
    ("form", "content"), [("melange", MELANGE), ("aibrix", AIBRIX)], ids=["melange", "aibrix"]
)
def test_tables_hold_at_their_points_and_between(tmp_path, form, content):
    table = read(tmp_path, content, form, edges=EDGES)
    assert table.rate((100, 50)) == (2, "measured")
    assert table.rate((400, 50)) == (5, "measured")
    assert table.rate((100, 200)) == (1, "measured")
    between = table.rate((200, 100))  # the middle of both logarithms: the mean of all four
    assert between.rate == pytest.approx((2 * 1 * 5 * 2) ** 0.25)


def test_sizes_beyond_a_table_are_extrapolated_and_said(tmp_path):
    table = read(tmp_path, AIBRIX, "aibrix")
    beyond = table.rate((800, 400))
    assert beyond.provenance == "modelled"
    assert beyond.rate == pytest.approx(2 * (400 + 200) / (800 + 400))
    assert table.rate((10, 10)).rate == 2  # smaller ones are not promised more


def test_a_zero_says_that_the_slo_could_not_be_met(tmp_path):
    table = read(tmp_path, AIBRIX | {"tputs": [[2, 5], [1, 0]]}, "aibrix")
    assert table.rate((400, 200)) is None
    assert table.rate((300, 150)) is None  # between points of which one failed
    assert table.rate((100, 200)) == (1, "measured")


def vllm(rate, inputs, outputs, ttft=100.0, tpot=20.0, **other):
    return {
        "completed": 10,
        "total_input_tokens": 10 * inputs,
        "total_output_tokens": 10 * outputs,
        "request_throughput": rate,
        "mean_ttft_ms": ttft,
        "mean_tpot_ms": tpot,
        **other,
    }


def test_runs_of_two_sizes_are_fitted(tmp_path):
    runs = [vllm(1 / 0.3, 1000, 100), vllm(1 / 0.5, 1000, 200), vllm(1.0, 1000, 200)]
    fit = read(tmp_path, runs, "vllm")
    assert fit.provenance == "fitted"
    assert fit.rate((1000, 100)).rate == pytest.approx(1 / 0.3)
    assert fit.rate((2000, 200)).rate == pytest.approx(1 / 0.6)


def test_a_run_of_one_size_is_stretched_by_assumption(tmp_path):
    fit = read(tmp_path, vllm(2.0, 1000, 100), "vllm")
    assert fit.rate((1000, 100)) == (pytest.approx(2.0), "assumed")
    assert fit.rate((1000, 300)).rate == pytest.approx(1.0)


def test_runs_that_miss_the_slo_do_not_count(tmp_path):
    late = vllm(9.0, 1000, 100, p99_ttft_ms=501.0)
    fit = read(tmp_path, [late, vllm(2.0, 1000, 100)], "vllm")
    assert fit.rate((1000, 100)).rate == pytest.approx(2.0)
    with pytest.raises(SetupError, match="meets the SLO"):
        read(tmp_path, late, "vllm")


def guidellm(rate, ttft):
    def of(value, **percentiles):
        return {"successful": {"mean": value, "percentiles": percentiles}}

    return {
        "metrics": {
            "requests_per_second": of(rate),
            "prompt_token_count": of(1000.0),
            "output_token_count": of(100.0),
            "time_to_first_token_ms": of(10.0, p90=ttft),
            "inter_token_latency_ms": of(20.0),
        }
    }


def test_guidellms_fastest_run_within_the_slo_counts(tmp_path):
    runs = {"benchmarks": [guidellm(1.0, 100.0), guidellm(3.0, 400.0), guidellm(5.0, 600.0)]}
    assert read(tmp_path, runs, "guidellm").rate((1000, 100)).rate == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("form", "content", "edges", "named"),
    [
        ("melange", MELANGE, None, "input_edges"),
        ("melange", {"L4": {}}, EDGES, "A10G"),
        ("melange", {"A10G": {"tputs": [[1, 2]]}}, EDGES, "tputs"),
        ("melange", {"A10G": {"tputs": [[1, -2], [1, 1]]}}, EDGES, "tputs"),
        ("aibrix", AIBRIX | {"indexes": [[200, 50], [100, 400]]}, None, "ascend"),
        ("aibrix", {"gpu": "x"}, None, "indexes"),
        ("vllm", {}, None, "mean_ttft_ms"),
        ("guidellm", {}, None, "benchmarks"),
        ("vllm", "no json", None, "profile.json"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, form, content, edges, named):
    with pytest.raises(SetupError, match=named):
        read(tmp_path, content, form, edges=edges)
