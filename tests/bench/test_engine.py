"""bench/engine.py in its tiny form: it must not rot between two measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "engine.py"


def run(*words):
    return subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=110
    )


@pytest.mark.model
def test_the_tiny_form_measures_every_figure_and_says_under_which_conditions():
    done = run("--tiny", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    figures = {cell["figure"]: cell["median"] for cell in report["cells"]}
    assert {cell["arm"] for cell in report["cells"]} == {"motley"}
    assert list(figures) == [
        *("prefill", "decode", "bound", "one", "eight", "sixteen", "short", "cores", "rss")
    ]
    assert all(value > 0 for value in figures.values())
    assert figures["bound"] < 1, "no engine reads weights faster than memory gives them"
    assert report["read_rates"]["1"] > 1e9
    assert report["conditions"]["cpu"]
    assert not report["skipped"]


def test_a_figure_or_an_engine_that_does_not_exist_is_refused_by_name():
    for words in (("--only", "prefill,latency"), ("--arms", "motley,latency")):
        done = run(*words)
        assert done.returncode == 2
        assert "'latency' is none of" in done.stderr
