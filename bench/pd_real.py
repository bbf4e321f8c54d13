"""Whether splitting prefill from decode pays, for real: two SmolLM2 workers of half a core each.

Requests are those of slices of the Azure code trace: its sizes, prompts a sixteenth as long, and
its arrivals, faster or slower to the rate that is wanted. Limits: TTFT five times a lone prefill of
the mean prompt, TPOT 1.5 times a lone step. By arm:

- mixed: two mixed workers under `least-load`, with prompts whole or cut by --itl-bound-ms, the
  better of the two.
- split: a prefill and a decode worker under `least-load`, which hands every prompt over.
- priced: two mixed workers under `priced`, which may hand over or not; so does
- roles: a prefill and a decode worker under `priced`.

For each: the highest rate of which 90 % meet both limits (refused ones do not), the most requests
in time per second at any rate, the 99th percentile of all gaps between tokens at the middle rate,
and what share of the routes was split. Where CPU caps cannot be set (see capped.py): exit code 3.

    python bench/pd_real.py
    python bench/pd_real.py --arms split priced --rates 2 3 4 --limits 600 12 --json
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from capped import Box, Request, can_cap, cluster, highest, told

TRACE = Path(__file__).parents[1] / "loadtest" / "traces" / "azure2023_code_0_1200s.csv"
CORES = 0.5
SHORTER = 16  # times: prompts of the trace
OUTPUTS = 128  # tokens at most
MEAN = 128  # tokens of the prompt that the limit on TTFT is about
BEGIN_S = 60.0  # of the trace: where the slice starts
SLACK = 5.0, 1.5
BOUNDS = (None, 3.0)  # of --itl-bound-ms, in lone steps
SKIPPED = 3
BOTH = (Box("one", CORES), Box("two", CORES))
APART = (Box("prefill", CORES, "prefill"), Box("decode", CORES, "decode"))
ARMS = {
    "mixed": (BOTH, "least-load"),
    "split": (APART, "least-load"),
    "priced": (BOTH, "priced"),
    "roles": (APART, "priced"),
}


def requests(rate: float, seconds: float, begin: float) -> list[Request]:
    """A slice of the trace as if it came at this rate."""
    with TRACE.open(encoding="utf-8") as lines:
        rows = [list(map(float, row)) for row in list(csv.reader(lines))[1:]]
    after = [row for row in rows if row[0] >= begin][: max(1, round(rate * seconds))]
    faster = seconds / (after[-1][0] - after[0][0]) if len(after) > 1 else 1.0
    return [
        Request((at - after[0][0]) * faster, max(1, int(size) // SHORTER), min(int(out), OUTPUTS))
        for at, size, out in after
    ]


async def lone() -> tuple[float, float]:
    """TTFT and TPOT of a request that is alone."""
    async with cluster([Box("alone", CORES)]) as it:
        return await it.alone(MEAN, 24)


async def run(
    arm: str, options: argparse.Namespace, limits: tuple[float, float], bound: float | None
) -> dict[str, Any]:
    boxes, policy = ARMS[arm]
    words = ("--itl-bound-ms", f"{1e3 * bound:.0f}") if bound else ()
    boxes = tuple(Box(box.name, box.cores, box.role, words) for box in boxes)
    rows: list[dict[str, float]] = []
    async with cluster(boxes, "--policy", policy) as it:
        await it.load(requests(min(options.rates), options.seconds / 2, 0.0), 98)  # warms up
        if policy == "priced":
            ttft, tpot = (1e3 * limit for limit in limits)
            it.headers = {"x-slo-ttft-ms": f"{ttft:.1f}", "x-slo-tpot-ms": f"{tpot:.1f}"}
        before = await it.metric("motley_disagg_decision_total", "decision_type")
        for number, rate in enumerate(options.rates):
            slice_ = requests(rate, options.seconds, BEGIN_S * (1 + number))
            answers = await it.load(slice_, number)
            met = sum(answer.met(*limits) for answer in answers)
            gaps = [gap for answer in answers for gap in answer.gaps]
            rows.append(
                {
                    "rate": rate,
                    "in_time": met / options.seconds,
                    "share": met / len(answers),
                    "refused": sum(not answer.times for answer in answers),
                    "itl_p99_ms": 1e3 * float(np.percentile(gaps or [0.0], 99)),
                }
            )
        after = await it.metric("motley_disagg_decision_total", "decision_type")
    routes = {kind: after[kind] - before.get(kind, 0.0) for kind in after}
    return {
        "rates": rows,
        "bound_ms": 1e3 * bound if bound else None,
        "goodput": highest(rows),
        "most": max(row["in_time"] for row in rows),
        "itl_p99_ms": rows[len(rows) // 2]["itl_p99_ms"],
        "split": routes.get("split", 0.0) / max(1.0, sum(routes.values())),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.limits:
        limits = options.limits[0] / 1e3, options.limits[1] / 1e3
    else:
        ttft, tpot = await lone()
        limits = SLACK[0] * ttft, SLACK[1] * tpot
    answer: dict[str, Any] = {"limits_ms": [1e3 * limit for limit in limits], "arms": {}}
    for arm in options.arms:
        step = limits[1] / SLACK[1]
        bounds = BOUNDS if arm == "mixed" and not options.tiny else BOUNDS[:1]
        tried = [
            await run(arm, options, limits, bound * step if bound else None) for bound in bounds
        ]
        answer["arms"][arm] = max(tried, key=lambda row: (row["goodput"], row["most"]))
    return answer


def show(answer: dict[str, Any]) -> None:
    ttft, tpot = answer["limits_ms"]
    print(f"limits: TTFT {ttft:.0f} ms, TPOT {tpot:.1f} ms")
    for arm, row in answer["arms"].items():
        bound = f", prompts cut for {row['bound_ms']:.0f} ms" if row["bound_ms"] else ""
        print(f"{arm:7} {told(row['rates'])}{bound}")
        print(
            f"        90 % in time up to {row['goodput']:.1f}/s, at most {row['most']:.1f}/s in "
            f"time, p99 ITL {row['itl_p99_ms']:.0f} ms, {row['split']:.0%} of routes split"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--seconds", type=float, default=15.0, help="at each rate (default 15)")
    parser.add_argument(
        "--limits", type=float, nargs=2, metavar="MS", help="TTFT and TPOT (default: measured)"
    )
    parser.add_argument("--tiny", action="store_true", help="whether it runs at all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not can_cap():
        sys.exit(SKIPPED)
    if options.tiny:
        options.seconds, options.rates, options.limits = 2.0, [2.0], [700.0, 15.0]
    answer = asyncio.run(measure(options))
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer)


if __name__ == "__main__":
    main()
