"""When splitting prefill from decode pays: 4 prefill + 4 decode workers against 8 mixed ones.

Simulated (`--simulated`), eight equal workers. Limits, fixed before any run: TTFT five times a lone
prefill of this prompt, TPOT 1.5 times a lone step; 90 % of the requests must meet both. Prompts and
outputs of one size each, Poisson arrivals. The mixed arm has least-load routing and its best
piece size; the split arm has the router, which may split or not.

For each size: goodput of both, and the share that the router splits, of the 4 + 4 and of the 8
when it routes those.

    python -m bench.pd --simulated
    python -m bench.pd --simulated --seconds 20 --json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from scheduler.capacity import Slo
from scheduler.cost import CostModel
from scheduler.messages import Role
from scheduler.policies import POLICIES
from scheduler.simulate import simulate
from scheduler.simulate_load import Process, draw
from scheduler.simulate_report import goodput
from scheduler.simulate_spec import WorkerSpec
from scheduler.workload import Arrival

if TYPE_CHECKING:
    from scheduler.routing import Policy
    from scheduler.simulate_spec import Outcome

# A model of 13 billion parameters on one A100: 512 tokens in 0.1 s, a step of 20 ms; 200 Gbit/s.
COST = CostModel(0.018, 1.6e-4, 5e-9, 1e-4, 4e-7, "assumed", 819200, 2.5e10)
KV_TOKENS = 60_000
PROMPTS, OUTPUTS, PIECES = (128, 512, 2048), (16, 64, 256), (128, 512, 2048)
LEAST, MOST = 200, 5000  # requests of a run
SHARE = 0.9


def workers(*counts: tuple[Role, int], piece: int = 512) -> list[WorkerSpec]:
    return [
        WorkerSpec(f"{role}-{n}", role, COST, KV_TOKENS, max_step_tokens=piece, max_sequences=256)
        for role, count in counts
        for n in range(count)
    ]


def slo(prompt: int) -> Slo:
    return Slo(5e3 * COST.prefill_s(prompt), 1.5e3 * COST.decode_step_s(1, prompt), SHARE)


def run(
    pool: list[WorkerSpec], size: tuple[int, int], policy: Policy, seconds: float, rate: float
) -> Outcome:
    count = min(max(LEAST, round(rate * seconds)), MOST)
    requests = draw(
        [Arrival(0.0, *size)], Process(), np.random.default_rng(2), count=count, rate=rate
    )
    return simulate(pool, requests, policy=policy, slo=slo(size[0]))


def attained(
    pool: list[WorkerSpec], size: tuple[int, int], policy: Policy, seconds: float, rate: float
) -> float:
    limits = slo(size[0])
    outcome = run(pool, size, policy, seconds, max(rate, 1e-3))
    return float(outcome.met(limits.ttft_ms / 1e3, limits.tpot_ms / 1e3).mean())


def most(size: tuple[int, int]) -> float:
    """Requests/s that eight workers cannot have: each computes nothing but prompts, or decodes."""
    prompt, output = size
    decode = output * COST.decode_step_s(256, 256 * prompt) / 256
    return 8 / max(COST.prefill_s(prompt), decode) * 1.1


def compare(size: tuple[int, int], seconds: float) -> dict[str, float]:
    priced, plain = POLICIES["priced"], POLICIES["least-load"]
    top = most(size)
    found = {}
    for piece in PIECES:
        pool = workers((Role.MIXED, 8), piece=piece)
        hold = partial(attained, pool, size, plain, seconds)
        found[piece] = goodput(hold, SHARE, top, top / 50)
    piece = max(found, key=lambda piece: found[piece])
    apart = workers((Role.PREFILL, 4), (Role.DECODE, 4))
    split = goodput(partial(attained, apart, size, priced, seconds), SHARE, top, top / 50)
    together = workers((Role.MIXED, 8), piece=piece)
    shares = [
        run(pool, size, priced, seconds, max(rate, 1e-2))
        for pool, rate in ((apart, split), (together, found[piece]))
    ]
    return {
        "mixed": found[piece],
        "piece": piece,
        "split": split,
        "gain": split / found[piece] if found[piece] else float("inf"),
        "splits_4+4": float((shares[0].prefilled != shares[0].decoded).mean()),
        "splits_8": float((shares[1].prefilled != shares[1].decoded).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulated", action="store_true", required=True)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run (default 40)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    answer = {}
    if not options.json:
        print("prompt output  8 mixed (piece)   4 + 4   gain   the router splits of 4 + 4, of 8")
    for size in product(PROMPTS, OUTPUTS):
        row = answer[f"{size[0]}/{size[1]}"] = compare(size, options.seconds)
        if not options.json:
            print(
                f"{size[0]:6} {size[1]:6} {row['mixed']:8.2f} {row['piece']:7} {row['split']:8.2f}"
                f" {row['gain']:6.2f} {row['splits_4+4']:13.0%} {row['splits_8']:13.0%}",
                flush=True,
            )
    if options.json:
        print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
