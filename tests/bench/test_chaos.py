"""bench/chaos.py in its short form: whatever happens to workers, clients lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "chaos.py"


def hurt(*words: str) -> dict:
    done = subprocess.run(
        [sys.executable, SCRIPT, *words, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.stdout, done.stderr
    (report,) = json.loads(done.stdout).values()
    return report


@pytest.mark.parametrize("scene", [("kills", "8"), ("stops", "2")], ids=lambda scene: scene[0])
def test_clients_of_workers_that_are_killed_or_stopped_lose_nothing(scene):
    name, count = scene
    report = hurt("--only", name, f"--{name}", count)
    assert report["requests hit"] > 0
    assert (report["lost"], report["wrong text"], report["missing or repeated tokens"]) == (0, 0, 0)


def test_clients_that_leave_leave_nothing_behind():
    report = hurt("--only", "disconnects", "--disconnects", "200")
    assert report["left before the end"] > 0
    assert report["leaked"] == {}
