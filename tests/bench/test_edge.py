"""The bench of groups still runs: real ranks, a real shard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.model
def test_the_bench_of_groups_measures_a_resident_and_a_streamed_arm():
    command = [sys.executable, "bench/edge.py", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    resident, streamed = json.loads(done.stdout)["results"]
    assert len(resident["peak_rss"]) == 2
    assert resident["streamed_share"] == 0
    assert streamed["streamed_share"] > 0.6
    assert streamed["read_per_token"] > 0.6 * 90e6
    assert streamed["tokens"] == resident["tokens"][: len(streamed["tokens"])]
