"""The bench of certification still runs: a small plan, certified, and run anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")
ROOT = Path(__file__).parents[2]


def test_the_bench_of_certification_runs_a_plan_anew():
    command = [sys.executable, "bench/certify.py", "--json", "--fresh", "1"]
    command += ["--rate-conversation", "1", "--rate-code", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["certified $/h"] == pytest.approx(row["first $/h"] * (1 + row["premium"]))
    assert row["poisson: fresh that hold"] == row["trace: fresh that hold"] == 1
    assert 0.9 <= row["trace: least"] <= 1
