"""Speed of the simulator, step by step and coarse: requests a minute of CPU, events/s, memory.

The conversation trace's sizes, Poisson arrivals, mixed workers at about four fifths of what they
could do. Each arm runs in a process of its own, so that its memory is its own.

    python bench/simulate.py
    python bench/simulate.py --workers 10000 --requests 1000000 --forms steps --runs 1 --json
    python bench/simulate.py --workers 10000 --forms coarse --loads 0.4 0.7 1 1.2 --runs 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from scheduler.capacity import Slo
from scheduler.cost import CostModel
from scheduler.messages import Role
from scheduler.simulate import simulate
from scheduler.simulate_coarse import simulate_coarse
from scheduler.simulate_load import Process, draw
from scheduler.simulate_report import summarise
from scheduler.simulate_spec import WorkerSpec
from scheduler.workload import read_trace

TRACE = Path(__file__).parents[1] / "loadtest/traces/azure2023_conv_0_1200s.csv"
COST = CostModel(0.02, 2e-4, 2e-8, 2e-4, 1.5e-7, "assumed")
RATE = 1.4  # requests/s of one worker
SLO = Slo(1000, 70, 0.9)
FORMS = {"steps": simulate, "coarse": simulate_coarse}


def arm(form: str, count: int, requests: int, load: float) -> dict[str, Any]:
    workers = [WorkerSpec(f"w{at}", Role.MIXED, COST, 60_000) for at in range(count)]
    rng = np.random.default_rng(0)
    rate = load * RATE * count
    drawn = draw(read_trace(TRACE), Process(), rng, count=requests, rate=rate)
    before = _peak()
    begun = time.process_time()
    outcome = FORMS[form](workers, drawn, slo=SLO)
    seconds = time.process_time() - begun
    said = summarise(outcome, workers, SLO)
    return {
        "form": form,
        "workers": count,
        "requests": requests,
        "rate": rate,
        "cpu_s": round(seconds, 2),
        "requests_per_min": round(60 * requests / seconds),
        "events_per_s": round(said.events / seconds),
        "peak_mb": round(_peak()),
        "of_it_mb": round(_peak() - before),
        "attainment": round(said.attainment, 4),
        "refused": said.refused,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[10])
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--runs", type=int, default=3, help="of each arm, in turn (default 3)")
    parser.add_argument(
        "--loads", type=float, nargs="*", default=[1.0], help="times that rate: hours of a day"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for _ in range(options.runs):
        for count in options.workers:
            for form, load in itertools.product(options.forms, options.loads):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(arm, (form, count, options.requests, load)))
                if not options.json:
                    print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
