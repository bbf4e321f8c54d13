"""What a router costs: ours with fake workers, and peers with fake engines that are as fast.

    python bench/router.py [--json] [--only chat,long,sse,crowd] [--routers motley,vllm-router]

    bench/peers.sh routers          # first, once: the peers, in an environment of their own
    python bench/router.py
    python bench/router.py --routers motley --only crowd

Each router is a process of its own, and so are its workers or engines and the load. All are up at
once and loaded in turn, a round each, several times: a figure is the median of the rounds, beside
the least and the most of the CPU time. This is the router's alone, by the kernel's clock; requests
a second and latencies are not. Who else uses the machine's host can double it: `loop ms` is the CPU
time of a fixed loop of Python, just before each round. A token of a prompt is 4 bytes. `added` is,
at half the rate that the closed loop reached, how much later than without a router answers come at
the median and at the 99th percentile: workers asked straight over the link (bench/router_floor.py),
engines over HTTP.

- chat: 1.2 KB, 16 tokens, not streamed; long: 220 KB, 1 token;
- sse: 1.2 KB, 50 tokens streamed; crowd: 2,000 streams at once at 5 tokens a second.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec
from msgspec.structs import replace
from router_arms import ARMS, Arm, run_load
from router_load import Load, Loaded

PEERS = Path(__file__).parent.parent / ".venv-peers-routers"
MODEL = "m"


class Workload(msgspec.Struct, frozen=True):
    """One kind of request."""

    prompt_bytes: int
    tokens: int
    stream: bool
    connections: int
    rounds: int
    requests: int  # of a round
    step_ms: float  # a token's time
    ramp_s: float = 0.0
    half: bool = False  # also at half the rate
    engines: int = 2

    def tiny(self) -> Workload:
        return replace(
            self,
            connections=4,
            rounds=2,
            requests=12,
            step_ms=1.0,
            ramp_s=0.0,
            tokens=min(self.tokens, 8),
        )

    def load(self, port: int) -> Load:
        return Load(
            port=port,
            path="/v1/chat/completions",
            connections=self.connections,
            requests=self.requests,
            model=MODEL,
            prompt_bytes=self.prompt_bytes,
            tokens=self.tokens,
            stream=self.stream,
            ramp_s=self.ramp_s,
        )


WORKLOADS = {
    "chat": Workload(1200, 16, False, 16, 9, 400, 1.0, half=True),
    "long": Workload(220_000, 1, False, 4, 5, 60, 1.0),
    "sse": Workload(1200, 50, True, 16, 5, 250, 1.0),
    "crowd": Workload(1200, 150, True, 2000, 1, 2000, 200.0, ramp_s=20.0, engines=4),
}


class Round(msgspec.Struct, frozen=True):
    """What one load on one router cost. CPU times in seconds."""

    loop: float  # of the fixed loop, just before
    done: Loaded
    cpu: float
    added: tuple[float, float] | None  # ms, at the median and the 99th percentile

    @property
    def cpu_us(self) -> float:
        """A request's."""
        return self.cpu / max(self.done.requests, 1) * 1e6


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One router under one workload: medians of its rounds. Times in microseconds of CPU."""

    router: str
    workload: str
    processes: int  # of the router
    rounds: int
    requests: int
    errors: int
    reason: str
    loop_ms: float
    cpu_us: float  # a request
    cpu_us_least: float
    cpu_us_most: float
    per_cpu_s: float  # requests
    per_s: float  # requests, on the wall clock
    token_us: float | None  # of streams
    load_cpu_us: float  # a request, in the load generator
    rss_mb: float  # of all processes of the router, at the end
    added_p50_ms: float | None = None
    added_p99_ms: float | None = None


def main() -> int:
    options = _options()
    figures: list[Figure] = []
    for name in options.only:
        workload = WORKLOADS[name].tiny() if options.tiny else WORKLOADS[name]
        found = compare(name, workload, options.routers, options.peers, options.processes)
        if not options.json:
            for figure in found:
                _print(figure, head=figure is found[0])
        figures += found
    if options.json:
        load = " ".join(f"{n:.1f}" for n in os.getloadavg())
        report = {"cpus": os.cpu_count(), "load_average": load, "results": figures}
        print(msgspec.json.encode(report).decode())
    return 1 if any(figure.errors for figure in figures) else 0


def compare(
    name: str, workload: Workload, routers: list[str], peers: Path, processes: int
) -> list[Figure]:
    """Start the routers, and load one after the other, again and again."""
    with ExitStack() as stack:
        arms = {
            router: stack.enter_context(
                ARMS[router](peers, workload.step_ms, processes, workload.engines)
            )
            for router in routers
        }
        rounds: dict[str, list[Round]] = {router: [] for router in arms}
        for _ in range(workload.rounds):
            for router, arm in arms.items():
                rounds[router].append(measure(arm, workload))
        return [_figure(router, name, arms[router], rounds[router]) for router in arms]


def _warm(arm: Arm, workload: Workload) -> None:
    count = max(4, workload.requests // 4)
    few, short = min(workload.connections, 16, count), min(4, workload.tokens)
    load = workload.load(arm.port)
    run_load(replace(load, requests=count, connections=few, tokens=short, ramp_s=0.0))


def measure(arm: Arm, workload: Workload) -> Round:
    """One round, warm: while the others had theirs, this one's memory left the caches."""
    _warm(arm, workload)
    loop = _fixed_loop()
    load = workload.load(arm.port)
    before = arm.cpu_s()
    done = run_load(load)
    cpu, added = arm.cpu_s() - before, None
    if workload.half and not done.errors:
        half = replace(load, rate=done.requests / done.wall / 2)
        through, floor = run_load(half).latencies, arm.floor(half)
        middle, tail = ((quantile(through, at) - quantile(floor, at)) * 1e3 for at in (0.5, 0.99))
        added = middle, tail
    return Round(loop, done, cpu, added)


def _fixed_loop() -> float:
    """Seconds of CPU: the same work every time."""
    begun = time.process_time()
    sum(number * number for number in range(500_000))
    return time.process_time() - begun


def _figure(router: str, name: str, arm: Arm, rounds: list[Round]) -> Figure:
    cpu = sorted(each.cpu_us for each in rounds)
    tokens = [each.cpu / each.done.events * 1e6 for each in rounds if each.done.events]
    added = [each.added for each in rounds if each.added]
    return Figure(
        router=router,
        workload=name,
        processes=arm.processes,
        rounds=len(rounds),
        requests=sum(each.done.requests for each in rounds),
        errors=sum(each.done.errors for each in rounds),
        reason=next((each.done.reason for each in rounds if each.done.errors), ""),
        loop_ms=median(each.loop for each in rounds) * 1e3,
        cpu_us=median(cpu),
        cpu_us_least=cpu[0],
        cpu_us_most=cpu[-1],
        per_cpu_s=1e6 / max(median(cpu), 1e-6),
        per_s=median(each.done.requests / each.done.wall for each in rounds),
        token_us=median(tokens) if tokens else None,
        load_cpu_us=median(each.done.cpu / max(each.done.requests, 1) * 1e6 for each in rounds),
        rss_mb=arm.rss_mb(),
        added_p50_ms=median(each[0] for each in added) if added else None,
        added_p99_ms=median(each[1] for each in added) if added else None,
    )


def quantile(ordered: list[float], share: float) -> float:
    return ordered[int(len(ordered) * share)]


def _print(figure: Figure, *, head: bool) -> None:
    columns = {
        "router": figure.router,
        "workload": figure.workload,
        "errors": figure.errors,
        "loop ms": f"{figure.loop_ms:.0f}",
        "CPU µs": f"{figure.cpu_us:.0f}",
        "least-most": f"{figure.cpu_us_least:.0f}-{figure.cpu_us_most:.0f}",
        "per CPU s": f"{figure.per_cpu_s:.0f}",
        "µs/token": "" if figure.token_us is None else f"{figure.token_us:.1f}",
        "req/s": f"{figure.per_s:.0f}",
        "RSS MB": f"{figure.rss_mb:.0f}",
        "added p50/p99 ms": ""
        if figure.added_p50_ms is None
        else f"{figure.added_p50_ms:.1f}/{figure.added_p99_ms:.1f}",
        "load CPU µs": f"{figure.load_cpu_us:.0f}",
    }
    if head:
        print(" ".join(f"{name:>13}" for name in columns))
    print(" ".join(f"{value:>13}" for value in columns.values()), figure.reason, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--tiny", action="store_true", help="few requests: that it works at all")
    parser.add_argument("--only", type=_names, default=list(WORKLOADS), metavar="WORKLOAD,…")
    parser.add_argument("--routers", type=_names, default=list(ARMS), metavar="ROUTER,…")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of our router")
    parser.add_argument("--peers", type=Path, default=PEERS, help="where peers.sh put them")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
