"""A slow link between workers, for real: learned by one hand-over, then avoided.

A prefill worker of one core, and two decode workers of about a sixth of a core, of which one is on
another host behind an emulated link (a network namespace and tc's tbf). Their own prompts are slow,
so a hand-over pays, and the far one has a little more CPU, so it is the first choice. For each of
some requests one after another: the steps of each worker, the time between its tokens, and the rate
of the link as the router believes it. Needs root, iproute2 and CPU caps; else the exit code is 3.

    python bench/slow_link.py
    python bench/slow_link.py --link 100mbit --requests 12 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

import numpy as np
from capped import IDS, Box, can_cap, cluster
from kv_ends import HERE, can_emulate, slow_link

PROMPT, OUTPUT = 500, 16
SKIPPED = 3
# Workers that see each other's processes share memory, whatever the network between them.
APART = ("unshare", "--pid", "--fork", "--kill-child")


async def measure(link: str, requests: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    with slow_link(link) as (_, prefix):
        boxes = (
            Box("prefill", 1.0, "prefill"),
            Box("near", 0.16, "decode"),
            Box("far", 0.2, "decode", place=(*prefix, *APART)),
        )
        async with cluster(boxes, "--policy", "priced", host=HERE) as it:
            for _ in range(requests):
                before = await it.metric("motley_worker_steps_total")
                prompt = rng.integers(IDS.start, IDS.stop, PROMPT).tolist()
                answer = await it.ask(prompt, OUTPUT)
                await asyncio.sleep(0.5)  # for the workers' reports
                after = await it.metric("motley_worker_steps_total")
                rates = await it.metric("motley_link_bytes_per_second", "receiver")
                rows.append(
                    {
                        "steps": {worker: after[worker] - before[worker] for worker in after},
                        "ttft": answer.ttft,
                        "tpot": answer.tpot,
                        "link_mb_s": rates.get("far", float("nan")) / 1e6,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--link", default="10mbit", help="of the far worker (default 10mbit)")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (can_emulate() and can_cap()):
        sys.exit(SKIPPED)
    rows = asyncio.run(measure(options.link, options.requests))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("steps: prefill, near, far    TTFT s  TPOT ms  the far link's MB/s, as believed")
    for row in rows:
        steps = ", ".join(f"{row['steps'][name]:5.0f}" for name in ("prefill", "near", "far"))
        print(f"{steps:24} {row['ttft']:10.2f} {1e3 * row['tpot']:8.0f} {row['link_mb_s']:8.2f}")


if __name__ == "__main__":
    main()
