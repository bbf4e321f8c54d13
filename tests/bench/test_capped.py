"""bench/pd_real.py in its tiny form, and what it and bench/unlike.py make of answers."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SKIPPED = 3


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def rows(*shares):
    return [{"rate": float(at), "share": share} for at, share in enumerate(shares, 1)]


@pytest.mark.parametrize(
    ("shares", "goodput"),
    [
        ((1.0, 1.0), 2.0),
        ((1.0, 0.8), 1.5),
        ((1.0, 0.9, 0.8), 2.0),
        ((0.8,), 0.5),
        ((0.5, 1.0), 0.2),
    ],
)
def test_goodput_is_where_ninety_percent_are_in_time_no_more(bench, shares, goodput):
    assert bench("capped").highest(rows(*shares)) == pytest.approx(goodput)


def test_a_request_that_was_refused_is_not_in_time(bench):
    answer = bench("capped").Answer
    assert answer([0.125, 0.25, 0.5]).met(0.125, 0.1875)
    assert not answer([0.125, 0.25, 0.5]).met(0.125, 0.18)
    assert not answer([0.25, 0.25]).met(0.125, 0.18)
    assert not answer().met(math.inf, math.inf)


def test_a_slice_of_the_trace_comes_at_the_rate_that_is_wanted(bench):
    found = bench("pd_real").requests(2.0, 30.0, 60.0)
    assert (len(found), found[0].at, found[-1].at) == (60, 0.0, pytest.approx(30.0))
    assert all(each.prompt >= 1 and 1 <= each.output <= 128 for each in found)


@pytest.mark.model
def test_the_priced_arm_runs():
    command = [sys.executable, BENCH / "pd_real.py", "--tiny", "--json", "--arms", "priced"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    if done.returncode == SKIPPED:
        pytest.skip("CPU caps need root and cgroup v1's cpu controller")
    assert done.returncode == 0, done.stderr
    (arm,) = json.loads(done.stdout)["arms"].values()
    assert [row["rate"] for row in arm["rates"]] == [2.0]
