"""Real clusters: `motley serve` and its children as processes, on ports that are free."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

READY_S = 90
STOP_S = 20


class Cluster:
    """A running `motley serve`. `log` is everything that it printed."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.process = process
        self.log_path = log_path
        self.url = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the log has the pattern; fails with the log if it does not come."""
        until(lambda: re.search(pattern, self.log) or self.process.poll() is not None, READY_S)
        found = re.search(pattern, self.log)
        assert found, f"{pattern!r} did not come:\n{self.log}"
        return found

    def metric(self, name: str, value: str, label: str = "worker") -> float:
        """A worker's figure, or that of another label's value, as /metrics has it now."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        found = re.search(rf'^{name}{{[^}}]*{label}="{value}"[^}}]*}} (\S+)$', text, re.MULTILINE)
        assert found, f"no {name} of {value}"
        return float(found.group(1))

    async def metric_becomes(self, name: str, worker: str, value: float) -> None:
        """Heartbeats bring a worker's figures a few times a second."""
        await asyncio.to_thread(until, lambda: self.metric(name, worker) == value, 10)
        assert self.metric(name, worker) == value

    def workers(self) -> list[int]:
        """Process ids of the workers, and of whatever they started."""
        return _descendants(self.process.pid)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Signal the front process only, and wait; gives its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    @staticmethod
    def alive(pids: list[int]) -> list[int]:
        """Those that still run; a zombie does not."""
        return [pid for pid in pids if _runs(pid)]


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Look until the condition holds; for what other processes do, of which no event tells us."""
    deadline, tick = time.monotonic() + seconds, threading.Event()
    while not (held := condition()) and time.monotonic() < deadline:
        tick.wait(0.02)
    return bool(held)


def _descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(name="until")
def until_fixture():
    return until


@pytest.fixture
def launch(tmp_path):
    """Start `motley ARGUMENTS`; whatever is left of it at the end is killed and fails the test."""

    @contextmanager
    def start(*arguments: str, prefix: tuple[str, ...] = (), environment=None):
        log_path = tmp_path / f"motley-{time.monotonic_ns()}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "motley", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path), **(environment or {})},
            )
        cluster = Cluster(process, log_path)
        try:
            yield cluster
        finally:
            below = cluster.workers() if process.poll() is None else []
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            left = cluster.alive(below)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            assert not left, f"processes {left} outlived motley:\n{cluster.log}"

    return start


@pytest.fixture
def serve(launch):
    """Start `motley serve ARGUMENTS` and wait for its ready line.

    Least load, unless told otherwise: it hands over whenever there is a prefill worker. An older
    release has no policies.
    """

    @contextmanager
    def start(*arguments: str, policy: str | None = "least-load", **options):
        chosen = ("--policy", policy) if policy else ()
        with launch("serve", "--port", "0", *chosen, *arguments, **options) as cluster:
            cluster.url = cluster.wait_for(r"Motley is ready: (\S+)").group(1)
            yield cluster

    return start
