"""bench/kv_transfer.py and bench/kv_codec.py in their tiny forms."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
GOALS = {"int8": (2, 0.5), "int4": (4, 0.5)}  # of 64 tokens: what it is worth, the whole one says


def run(script: str, *words: str) -> list[dict]:
    """The figures that it prints."""
    command = [sys.executable, BENCH / script, "--tiny", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_rates_are_of_the_network_and_of_memory():
    figures = run("kv_transfer.py", "--only", "rates")
    assert [figure["name"] for figure in figures] == ["tcp", "memory"]
    assert all(figure["value"] > 0 for figure in figures)


@pytest.mark.model
@pytest.mark.netns
@pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")),
    reason="a slow link needs root, iproute2 and its tc",
)
def test_prefill_hides_a_transfer_over_a_gigabit_link():
    (figure,) = run("kv_transfer.py", "--only", "hidden")
    assert figure["value"] >= figure["least"] == 80


@pytest.mark.model
def test_packed_kv_is_smaller_and_mostly_continues_alike():
    for result in run("kv_codec.py", "--threads", "1"):
        smaller, agreement = GOALS[result["codec"]]
        assert result["times_smaller"] > smaller
        assert result["agreement"] >= agreement


def test_a_figure_that_does_not_exist_is_refused_by_name():
    command = [sys.executable, BENCH / "kv_transfer.py", "--only", "rates,latency"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "'latency' is none of" in done.stderr
