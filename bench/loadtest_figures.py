"""What the load test itself can do: `python bench/loadtest_figures.py [speed|start|gamma|…]`.

speed   streaming requests per CPU-second of the client: marginal cost between two run lengths
start   seconds until the command has ended that sends one request, and until `--help` has
gamma   realised CV of gamma arrivals, CV 1-5, over 20 seeds
search  capacity of M/D/c queues found in virtual time, 100 seeded trials of each
live    the same against the built-in server in real time, three trials
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadtest.arrivals import Arrivals, realised, schedule
from loadtest.mdc import Queue
from loadtest.search import Search, Trial

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUES = (
    (Queue(4, 0.1), 0.25),
    (Queue(1, 0.1), 0.2),
    (Queue(8, 0.01), 0.02),
    (Queue(4, 0.1), 0.05),
)
SHARE = 0.9
TRIALS = 100


@contextmanager
def server(*words: str) -> Iterator[str]:
    """The built-in server in a process of its own; its address."""
    command = [sys.executable, "-m", "loadtest", "server", "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "a pipe was asked for"
        yield process.stdout.readline().split()[-1]
        process.terminate()


def bench(*words: str) -> tuple[dict[str, object], float, float, float]:
    """One `run --json`: its report, CPU-s, wall seconds, peak RSS in MB of the whole process."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "loadtest", "run", "--json", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None, "a pipe was asked for"
    report = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - begin
    return report, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024


def speed() -> None:
    for load in (("--concurrency", "32"), ("--arrivals", "poisson", "--rate", "500")):
        with server("--ttft", "20ms", "--itl", "5ms") as url:
            common = ("--url", url, *load, "--output", "16", "--slo", "ttft=2s,tpot=1s")
            cpu = {}
            for requests in (1_000, 10_000):
                report, cpu[requests], _, rss = bench(*common, "--requests", str(requests))
                totals = report["totals"]
                assert isinstance(totals, dict)
                print(
                    f"{' '.join(load)}: {requests} requests, {totals['answered']} answered with "
                    f"{totals['output_tokens']} tokens, {totals['coalesced_share']:.1%} of chunks "
                    f"read together: {cpu[requests]:.2f} CPU-s, peak RSS {rss:.0f} MB"
                )
        marginal = 9_000 / (cpu[10_000] - cpu[1_000])
        print(f"  {marginal:.0f} requests per CPU-s, all of it {10_000 / cpu[10_000]:.0f}")


def start() -> None:
    with server() as url:
        begin = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "loadtest", "--help"], capture_output=True, check=True
        )
        print(f"--help: {time.monotonic() - begin:.2f} s")
        _, cpu, wall, rss = bench(
            "--url", url, "--requests", "1", "--rate", "1000", "--output", "1"
        )
        print(f"one request of 50 ms, whole command: {wall:.2f} s, {cpu:.2f} CPU-s, {rss:.0f} MB")


def gamma() -> None:
    for cv in (1, 2, 3, 4, 5):
        found = [
            realised(
                schedule(
                    Arrivals("gamma", 10, cv), random.Random(seed), count=10_000, duration=None
                )
            ).cv
            for seed in range(20)
        ]
        worst = max(abs(one / cv - 1) for one in found)
        print(f"CV {cv}: realised {min(found):.3f} … {max(found):.3f}, worst {worst:.2%} off")


def search() -> None:
    for queue, limit in QUEUES:
        capacity = queue.capacity(limit, SHARE)
        errors, probes, requests = [], [], 0
        for seed in range(TRIALS):
            rng = random.Random(seed)
            hunt = Search(SHARE, capacity / 2 ** rng.uniform(1, 6))
            while (rate := hunt.next_rate()) is not None:
                trial = Trial(SHARE, least=4000, most=30_000)
                next(wait for wait in queue.waits(rate, rng) if trial.add(wait <= limit))
                hunt.tell(trial.probe(rate))
                requests += hunt.probes[-1].scheduled
            probes.append(len(hunt.probes))
            errors.append((hunt.capacity or 0) / capacity - 1)
        within = sum(abs(error) <= 0.05 for error in errors)
        print(
            f"M/D/{queue.servers}, D {queue.service:g} s, wait ≤ {limit:g} s: capacity "
            f"{capacity:.2f}/s; {within} of {TRIALS} within 5 % (worst {min(errors):+.1%}, "
            f"{max(errors):+.1%}), at most {max(probes)} probes, {requests // TRIALS} requests each"
        )


def live() -> None:
    """Four slots of 10 ms; a wait of at most 25 ms is a TTFT of at most 35 ms."""
    queue, wait = Queue(4, 0.01), 0.025
    capacity = queue.capacity(wait, SHARE)
    print(f"analytic capacity {capacity:.1f}/s")
    for seed in range(3):
        with server("--ttft", "10ms", "--itl", "1ms", "--slots", "4") as url:
            words = ("--url", url, "--from", "50", "--input", "4", "--output", "1")
            words += (
                "--slo",
                f"ttft={(wait + queue.service) * 1e3:g}ms",
                "--seed",
                str(1000 * seed),
            )
            words += ("--least", "4000", "--most", "12000", "--probe-time", "60s")
            command = [sys.executable, "-m", "loadtest", "search", "--json", *words]
            done = subprocess.run(command, capture_output=True, check=False)
            found = json.loads(done.stdout)
        checks = [check for measured in found["measured"] for check in measured["checks"]]
        late = sum(check["value"] > check["limit"] for check in checks)
        print(
            f"seed {seed}: {found['capacity']:.1f}/s, {found['capacity'] / capacity - 1:+.1%}, "
            f"{len(found['measured'])} probes, {late} of {len(checks)} checks broken",
            flush=True,
        )


if __name__ == "__main__":
    commands = {"speed": speed, "start": start, "gamma": gamma, "search": search, "live": live}
    names = sys.argv[1:] or list(commands)
    for name in names:
        if name not in commands:
            sys.exit(f"{name}: not one of {', '.join(commands)}")
        commands[name]()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest child process: {peak:.0f} MB")
