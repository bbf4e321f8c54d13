"""The bench of the router still runs: a real router, real workers, a real load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_bench_of_the_router_counts_its_cpu_time_and_no_errors():
    command = [sys.executable, "bench/router.py", "--tiny", "--json", "--routers", "motley"]
    command += ["--only", "chat,sse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr + done.stdout
    chat, sse = json.loads(done.stdout)["results"]
    assert (chat["requests"], chat["errors"]) == (24, 0)
    assert (sse["requests"], sse["errors"]) == (24, 0)
    assert chat["rss_mb"] > 10
    assert 0 < chat["cpu_us_least"] <= chat["cpu_us"] <= chat["cpu_us_most"]
    assert sse["token_us"] is not None
