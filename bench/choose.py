"""CPU time of one routing decision, by the number of workers and by policy.

Workers are a third each prefill, decode and mixed, of two speeds, with random queues and batches.

    python -m bench.choose
    python -m bench.choose --workers 6 10000 --json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from statistics import median

from scheduler.cost import CostModel
from scheduler.errors import Unavailable
from scheduler.fleet import Fleet, Worker
from scheduler.messages import Address, Role
from scheduler.policies import POLICIES
from scheduler.pricing import Demand
from scheduler.routing import choose

COST = CostModel(0.018, 1.5e-4, 6e-9, 1.2e-4, 1.8e-7, "assumed", 131072, 1.25e9)
ROLES = list(Role)
ROUNDS, CALLS = 7, 300


def fleet(count: int, draw: random.Random) -> Fleet:
    made = Fleet()
    for at in range(count):
        cost = COST if at % 2 else COST.slower(1 / 3)
        worker = Worker(f"w{at}", ROLES[at % 3], Address("h", 1), cost, kv_tokens=400_000)
        for _ in range(draw.randrange(3)):
            worker.enqueue((0, 0), 1000, 500_500, 0.0)
        worker.running = worker.outstanding = draw.randrange(40)
        worker.context = worker.held = 1000.0 * worker.running
        made.add(worker)
    return made


def microseconds(policy: str, count: int, *, limited: bool) -> float:
    """Median over rounds of the CPU time of one call."""
    draw = random.Random(1)
    workers = fleet(count, draw)
    ttft, tpot = (2.0, 0.1) if limited else (math.inf, math.inf)
    times = []
    for _ in range(ROUNDS):
        demands = [Demand(1000, 200.0, 1, ttft, tpot, number=n) for n in range(CALLS)]
        begun = time.process_time()
        for demand in demands:
            try:
                choose(demand, workers, 1.0, draw.random, POLICIES[policy])
            except Unavailable:
                continue
        times.append((time.process_time() - begun) / CALLS)
    return 1e6 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 6, 32, 100, 1000, 10_000])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    arms = [(f"{name}, limits", name, True) for name in ("priced",)]
    arms += [(name, name, False) for name in POLICIES]
    answer = {
        label: {count: microseconds(name, count, limited=limited) for count in options.workers}
        for label, name, limited in arms
    }
    if options.json:
        print(json.dumps(answer, indent=1))
        return
    print(f"{'µs of CPU':20}" + "".join(f"{count:>10,}" for count in options.workers) + "  workers")
    for label, row in answer.items():
        print(f"{label:20}" + "".join(f"{value:10.0f}" for value in row.values()))


if __name__ == "__main__":
    main()
