"""The kernels' benchmark runs, and its numbers fit together."""

from __future__ import annotations

import json

import pytest

from kernels import bench, dispatch
from kernels.program import FORMATS

pytestmark = pytest.mark.skipif(
    not dispatch.instruction_sets(),
    reason="the kernels' library is not built: there was no C++ compiler",
)
SMALL = ["--side", "256", "--megabytes", "1", "--budget", "0"]


def test_json_has_every_kernel_and_the_memory_rate(capsys):
    bench.main([*SMALL, "--json"])
    report = json.loads(capsys.readouterr().out)
    kernels = {result["kernel"] for result in report["results"]}
    assert {f"matmul {kind}" for kind in FORMATS} | {"memory read", "norm", "silu_mul"} <= kernels
    assert report["instruction_set"] == dispatch.instruction_sets()[0]
    assert report["memory_gb_per_s"] > 0
    for result in report["results"]:
        assert 0 < result["best_ms"] <= result["median_ms"]
        assert result["gmac_per_s"] == pytest.approx(result["gweights_per_s"] * result["rows"])


def test_the_table_has_a_line_for_each_result(capsys):
    bench.main([*SMALL, "--threads", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("instruction set: ")
    assert len({len(line) for line in lines[1:]}) == 1
