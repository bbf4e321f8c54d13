"""Certified plans of the Azure traces, simulated anew with seeds that certification has not seen.

    python bench/certify.py [--json] [--rate-conversation 20] [--rate-code 8] [--fresh 10]

A plan's promise is that a fresh run holds its SLO: the last lines say how many did, under Poisson
arrivals and on the trace, and the least share in time among them. The SLOs are those of
docs/planner.md; seconds are of CPU time, for planning and certifying.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from scheduler.certify import Certifier
from scheduler.plan_command import quiet
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.service_file import parse_service

TRACES = Path(__file__).parents[1] / "loadtest" / "traces"
FIRST_FRESH_SEED = 1000  # certification counts from 0
SERVICE = """
[slo]
ttft_ms = {ttft_ms}
tpot_ms = {tpot_ms}
share = 0.9
[[model]]
name = "llama-3.1-8b"
trace = "azure2023_{trace}_0_1200s.csv"
rate = {rate}
[plan]
gpus = ["L4", "A10G", "A100-80GB", "H100"]
"""
LIMITS = {"conv": (1500, 60), "code": (2500, 80)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rate-conversation", type=float, default=20.0, metavar="PER_S")
    parser.add_argument("--rate-code", type=float, default=8.0, metavar="PER_S")
    parser.add_argument("--fresh", type=int, default=10, metavar="N", help="fresh runs of each")
    args = parser.parse_args()
    rates = {"conv": args.rate_conversation, "code": args.rate_code}
    rows = [certified(trace, rate, args.fresh) for trace, rate in rates.items() if rate > 0]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("", *(str(row.pop("trace")) for row in rows))
    for name in rows[0]:
        values = (row[name] for row in rows)
        table.add_row(name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)


def certified(trace: str, rate: float, fresh: int) -> dict[str, object]:
    """The plan as first made, as certified, and what fresh runs of that give."""
    ttft_ms, tpot_ms = LIMITS[trace]
    text = SERVICE.format(trace=trace, rate=rate, ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    service = parse_service(text, TRACES)
    begun = time.process_time()
    built = build(service)
    certifier = Certifier(service, built, time.perf_counter, np.random.default_rng)
    with quiet():
        first = make_plan(built.problem, built.options, time.perf_counter)
        plan, certificate = certifier.certify(first)
    row: dict[str, object] = {
        "trace": trace,
        "req/s": rate,
        "first $/h": first.cost,
        "certified $/h": plan.cost if certificate.certified else certificate.reason,
        "premium": certificate.premium,
        "rounds": certificate.rounds,
        "CPU s": time.process_time() - begun,
    }
    share = service.demands[0].slo.share
    seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + fresh)
    for runs in certifier.simulate(plan, seeds).values():
        for process, shares in runs.items():
            row[f"{process}: fresh that hold"] = sum(run.both >= share for run in shares)
            row[f"{process}: least"] = min(run.both for run in shares)
    return row


if __name__ == "__main__":
    sys.exit(main())
