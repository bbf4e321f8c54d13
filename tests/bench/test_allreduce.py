"""The bench of sums still runs: real processes, every way, emulated links."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [(), ("--grid", "--link", "300Mbit,1ms")])
def test_the_bench_of_sums_measures_every_way(options):
    command = [sys.executable, "bench/allreduce.py", "--tiny", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    if options:
        assert len(rows) == 5
        assert all(row["ms"]["direct"] >= 1.0 for row in rows)  # the link's delay
    else:
        ways = {row["way"] for row in rows}
        assert {"star", "direct", "two-shot", "ring", "raw star", "pickle star"} == ways
