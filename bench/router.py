"""What a router costs: ours with fake workers, and peers with fake engines that are as fast.

    python bench/router.py [--json] [--only chat,long,sse,crowd] [--routers motley,vllm-router]

    bench/peers.sh routers          # first, once: the peers, in an environment of their own
    python bench/router.py
    python bench/router.py --routers motley --only crowd

Each router is a process of its own, and so are its workers or engines and the load. The CPU
time is the router's alone, from /proc, and robust on a busy machine; requests a second and
latencies are not. A token of a prompt is 4 bytes. `added` is, at half the rate that the closed loop
reached, how much later than without a router answers come at the median and at the 99th percentile:
workers asked straight over the link (bench/router_floor.py), engines over HTTP.

- chat: 1.2 KB, 16 tokens, not streamed; long: 220 KB, 1 token;
- sse: 1.2 KB, 50 tokens streamed; crowd: 2,000 streams at once at 5 tokens a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace
from router_arms import ARMS, Arm, run_load
from router_load import Load

PEERS = Path(__file__).parent.parent / ".venv-peers-routers"
MODEL = "m"


class Workload(msgspec.Struct, frozen=True):
    """One kind of request."""

    prompt_bytes: int
    tokens: int
    stream: bool
    connections: int
    requests: int
    step_ms: float  # a token's time
    ramp_s: float = 0.0
    half: bool = False  # also at half the rate
    engines: int = 2

    def tiny(self) -> Workload:
        return replace(
            self, connections=4, requests=12, step_ms=1.0, ramp_s=0.0, tokens=min(self.tokens, 8)
        )


WORKLOADS = {
    "chat": Workload(1200, 16, False, 16, 3000, 1.0, half=True),
    "long": Workload(220_000, 1, False, 4, 150, 1.0),
    "sse": Workload(1200, 50, True, 16, 1000, 1.0),
    "crowd": Workload(1200, 150, True, 2000, 2000, 200.0, ramp_s=20.0, engines=4),
}


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One router under one workload. Times in microseconds of CPU unless they say otherwise."""

    router: str
    workload: str
    processes: int  # of the router
    requests: int
    errors: int
    reason: str
    cpu_us: float  # a request
    per_cpu_s: float  # requests
    per_s: float  # requests, on the wall clock
    token_us: float | None  # of streams
    load_cpu_us: float  # a request, in the load generator
    rss_mb: float  # of all processes of the router, at the end
    added_p50_ms: float | None = None
    added_p99_ms: float | None = None


def main() -> int:
    options = _options()
    figures = []
    for name in options.only:
        workload = WORKLOADS[name].tiny() if options.tiny else WORKLOADS[name]
        for router in options.routers:
            arm = ARMS[router](options.peers, workload.step_ms, options.processes, workload.engines)
            figures.append(measure(router, name, workload, arm))
            if not options.json:
                _print(figures[-1], head=len(figures) == 1)
    if options.json:
        load = " ".join(f"{n:.1f}" for n in os.getloadavg())
        report = {"cpus": os.cpu_count(), "load_average": load, "results": figures}
        print(msgspec.json.encode(report).decode())
    return 1 if any(figure.errors for figure in figures) else 0


def measure(router: str, name: str, workload: Workload, arm: Arm) -> Figure:
    """Start the router, warm it, load it, and take its CPU time."""
    with arm:
        load = Load(
            port=arm.port,
            path="/v1/chat/completions",
            connections=workload.connections,
            requests=workload.requests,
            model=MODEL,
            prompt_bytes=workload.prompt_bytes,
            tokens=workload.tokens,
            stream=workload.stream,
            ramp_s=workload.ramp_s,
        )
        warm = max(4, workload.requests // 20)
        few = min(workload.connections, 16, warm)
        short = min(4, workload.tokens)
        run_load(replace(load, requests=warm, connections=few, tokens=short, ramp_s=0.0))
        before = arm.cpu_s()
        done = run_load(load)
        cpu = arm.cpu_s() - before
        rss = arm.rss_mb()
        added = None
        if workload.half and not done.errors:
            rate = done.requests / done.wall / 2
            half = replace(load, rate=rate, requests=max(2 * arm.engines, workload.requests // 3))
            through, floor = run_load(half).latencies, arm.floor(half)
            added = [(quantile(through, at) - quantile(floor, at)) * 1e3 for at in (0.5, 0.99)]
    count = max(done.requests, 1)
    return Figure(
        router=router,
        workload=name,
        processes=arm.processes,
        requests=done.requests,
        errors=done.errors,
        reason=done.reason,
        cpu_us=cpu / count * 1e6,
        per_cpu_s=count / max(cpu, 1e-6),
        per_s=count / done.wall,
        token_us=cpu / done.events * 1e6 if done.events else None,
        load_cpu_us=done.cpu / count * 1e6,
        rss_mb=rss,
        added_p50_ms=added[0] if added else None,
        added_p99_ms=added[1] if added else None,
    )


def quantile(ordered: list[float], share: float) -> float:
    return ordered[int(len(ordered) * share)]


def _print(figure: Figure, *, head: bool) -> None:
    columns = {
        "router": figure.router,
        "workload": figure.workload,
        "errors": figure.errors,
        "CPU µs": f"{figure.cpu_us:.0f}",
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
