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


# ── files as their tools write them, cut ────────────────────────────────────────────────────────

AIBRIX_FILE = {
    "gpu": "simulator-llama2-7b-a100",
    "cost": 1.0,
    "tputs": [[62.5, 32.3, 16.8], [15.2, 15.1, 8.1], [3.86, 3.85, 0.0], [0.0, 0.0, 0.0]],
    "indexes": [[4, 64, 256, 512], [128, 256, 512]],
    "created": 1748888478.258241,
    "e2e": [[0.1, 0.12, 0.21], [0.82, 0.99, 1.04], [2.98, 3.25, 3.95], [5.48, 5.72, 6.24]],
    "slos": {"percentile": 99, "e2e": 5.0},
}


def test_an_aibrix_profile_says_what_it_was_made_for(tmp_path):
    table = read(tmp_path, AIBRIX_FILE, "aibrix")
    assert table.rate((256, 64)) == (15.1, "measured")
    assert table.rate((512, 256)) is None
    assert table.source == "profile.json, made for e2e 5 s at P99"


def vllm_file(rate, **other):
    """What `vllm bench serve --save-result` writes, without its lists."""
    return {
        "date": "20260801-101500",
        "endpoint_type": "openai",
        "label": None,
        "model_id": "meta-llama/Llama-3.1-8B-Instruct",
        "num_prompts": 200,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": 32,
        "duration": 200 / rate,
        "completed": 200,
        "failed": 0,
        "total_input_tokens": 200 * 1024,
        "total_output_tokens": 200 * 128,
        "request_throughput": rate,
        "request_goodput": None,
        "output_throughput": rate * 128,
        "mean_ttft_ms": 150.0,
        "median_ttft_ms": 140.0,
        "std_ttft_ms": 30.0,
        "p99_ttft_ms": 300.0,
        "mean_tpot_ms": 20.0,
        "median_tpot_ms": 19.0,
        "std_tpot_ms": 2.0,
        "p99_tpot_ms": 30.0,
        "p99.9_tpot_ms": 80.0,
        "mean_itl_ms": 20.0,
        "p99_itl_ms": 45.0,
    } | other


def test_a_vllm_result_and_one_that_was_appended_to(tmp_path):
    assert read(tmp_path, vllm_file(4.0), "vllm").rate((1024, 128)).rate == pytest.approx(4.0)
    lines = "\n".join(json.dumps(vllm_file(rate)) for rate in (4.0, 5.5)) + "\n"
    assert read(tmp_path, lines, "vllm").rate((1024, 128)).rate == pytest.approx(5.5)


def test_the_lowest_percentile_that_is_not_below_the_share_counts(tmp_path):
    late = vllm_file(4.0, p99_ttft_ms=501.0)
    with pytest.raises(SetupError, match="meets the SLO"):
        read(tmp_path, late, "vllm")
    held = vllm_file(4.0, p99_ttft_ms=501.0, p90_ttft_ms=499.0)
    assert read(tmp_path, held, "vllm").rate((1024, 128)).rate == pytest.approx(4.0)


def guidellm_file(*rates):
    """GuideLLM's report: percentiles, distributions by status, and summaries of other shapes."""

    def of(mean, spread=1.0):
        successful = {
            "mean": mean,
            "median": mean,
            "std_dev": 0.1,
            "count": 60,
            "percentiles": {"p001": 0.0, "p05": mean, "p50": mean, "p95": mean * spread}
            | {"p99": mean * spread, "p999": 1e6},
        }
        none = {"mean": 0.0, "percentiles": {}}
        return {"successful": successful, "errored": none, "incomplete": none, "total": successful}

    def run(rate):
        return {
            "config": {"strategy": {"type_": "constant", "rate": rate}},
            "metrics": {
                "request_totals": {"successful": 60, "errored": 0, "incomplete": 0, "total": 60},
                "requests_per_second": of(rate),
                "request_concurrency": of(3.0),
                "prompt_token_count": of(256.0),
                "output_token_count": of(64.0),
                "time_to_first_token_ms": of(90.0 * rate, 1.5),
                "inter_token_latency_ms": of(12.0),
                "text": {"tokens": {"input": of(256.0), "output": None}},
                "image": None,
            },
        }

    return {"metadata": {"version": 1}, "benchmarks": [run(rate) for rate in rates]}


def test_a_guidellm_report_has_other_summaries_beside_those_that_count(tmp_path):
    found = read(tmp_path, guidellm_file(1.0, 3.0, 4.0), "guidellm")
    # At 90 % p95 counts: 90 ms · rate · 1.5 is at most 500 ms up to 3 requests/s.
    assert found.rate((256, 64)).rate == pytest.approx(3.0)
    assert read(tmp_path, guidellm_file(0.0, 1.0), "guidellm").rate(
        (256, 64)
    ).rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("form", "path", "value", "named"),
    [
        ("melange", ("A10G",), None, "'A10G' is missing"),
        ("melange", ("A10G", "tputs"), None, "A10G"),
        ("melange", ("A10G", "tputs"), [[1, 2]], "tputs: 1 × 2 rates for 2 inputs and 2 outputs"),
        ("melange", ("A10G", "tputs", 0, 1), -2, "A10G.tputs"),
        ("melange", ("A10G", "tputs", 0, 1), float("nan"), "tputs[0][1]"),
        ("melange", ("A10G", "tputs", 0, 1), "fast", "A10G.tputs"),
        ("aibrix", ("indexes",), None, "indexes"),
        ("aibrix", ("indexes", 0), [64, 4, 256, 512], "outputs [64.0, 4.0, 256.0, 512.0]"),
        ("aibrix", ("indexes", 1), [128, 256], "tputs: 3 × 4 rates for 2 inputs"),
        ("aibrix", ("tputs", 2), [1.0], "tputs"),
        ("aibrix", ("tputs", 2, 1), -1, "tputs"),
        ("aibrix", ("slos",), 5, "slos"),
        ("vllm", ("completed",), 0, "completed"),
        ("vllm", ("completed",), None, "completed"),
        ("vllm", ("request_throughput",), 0, "request_throughput"),
        ("vllm", ("request_throughput",), float("nan"), "request_throughput"),
        ("vllm", ("request_throughput",), "inf", "request_throughput"),
        ("vllm", ("total_input_tokens",), -5, "total_input_tokens"),
        ("vllm", ("p99_ttft_ms",), "late", "p99_ttft_ms"),
        ("vllm", ("p99_ttft_ms",), float("nan"), "p99_ttft_ms"),
        ("guidellm", ("benchmarks",), None, "benchmarks"),
        ("guidellm", ("benchmarks",), [], "no run"),
        ("guidellm", ("benchmarks", 0, "metrics", "time_to_first_token_ms"), None, "time_to_first"),
        ("guidellm", ("benchmarks", 0, "metrics", "requests_per_second"), 4, "requests_per_second"),
        (
            "guidellm",
            ("benchmarks", 0, "metrics", "output_token_count", "successful", "mean"),
            float("nan"),
            "benchmarks[0].metrics.output_token_count.successful.mean",
        ),
    ],
)
def test_a_bad_field_is_named(changed, tmp_path, form, path, value, named):
    files = {
        "melange": MELANGE,
        "aibrix": AIBRIX_FILE,
        "vllm": vllm_file(4.0),
        "guidellm": guidellm_file(1.0),
    }
    with pytest.raises(SetupError) as caught:
        read(tmp_path, changed(files[form], path, value), form, edges=EDGES)
    assert named in str(caught.value)
    assert "profile.json" in str(caught.value)


@pytest.mark.parametrize("form", ["melange", "aibrix", "vllm", "guidellm"])
@pytest.mark.parametrize("text", ["", "no json", "[]", "null", "3", "[" * 100_000, "{}\n{}"])
def test_what_is_no_such_file_at_all_is_refused(tmp_path, form, text):
    with pytest.raises(SetupError, match=r"profile\.json"):
        read(tmp_path, text, form, edges=EDGES)


def test_a_melange_table_needs_its_edges(tmp_path):
    with pytest.raises(SetupError, match="input_edges"):
        read(tmp_path, MELANGE, "melange")
