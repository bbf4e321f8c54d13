"""When splitting prefill from decode pays: 4 prefill + 4 decode workers against 8 mixed ones.

Simulated, eight equal workers. Limits, fixed before any run: TTFT five times a lone prefill of this
prompt, TPOT 1.5 times a lone step; 90 % of the requests must meet both, a refused one meets none.
Prompts and outputs of one size each, or drawn from the Azure code trace (limits of its mean
prompt); Poisson arrivals. Goodput of

- 8 mixed workers with least-load routing, at their best piece size,
- 4 + 4 with the router, at their best piece size,
- the 8 mixed with the router, which may split (share of the requests that it did), and with the
  router told not to: at the piece size of the first.

    python -m bench.pd --simulated
    python -m bench.pd --simulated --sizes 2048/64 code --seed 7 --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scheduler.capacity import Slo
from scheduler.cost import CostModel
from scheduler.messages import Role
from scheduler.policies import POLICIES
from scheduler.routing import Chosen, Lanes, priced
from scheduler.simulate import simulate
from scheduler.simulate_load import Process, draw
from scheduler.simulate_report import goodput
from scheduler.simulate_spec import WorkerSpec
from scheduler.workload import Arrival, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.pricing import Demand
    from scheduler.routing import Policy
    from scheduler.simulate_spec import Outcome

# A model of 13 billion parameters on one A100: 512 tokens in 0.1 s, a step of 20 ms; 200 Gbit/s.
COST = CostModel(0.018, 1.6e-4, 5e-9, 1e-4, 4e-7, "assumed", 819200, 2.5e10)
KV_TOKENS = 60_000
PIECES = (128, 512, 2048)
SIZES = [f"{prompt}/{output}" for prompt in (128, 512, 2048) for output in (16, 64, 256)]
TRACE = Path(__file__).parents[1] / "loadtest/traces/azure2023_code_0_1200s.csv"
LEAST, MOST = 300, 1500  # requests of a run
SHARE = 0.9
STEPS = 64  # of the highest rate: how exact goodput is


def whole(demand: Demand, lanes: Lanes, now: float, draw: Callable[[], float]) -> Chosen:
    """The router, told not to split."""
    return priced(demand, Lanes((), lanes.decode), now, draw)


class Case:
    """One workload with its limits, and the same draws at every rate."""

    def __init__(self, name: str, seconds: float, seed: int) -> None:
        if name == "code":
            self.sizes = read_trace(TRACE)
        else:
            prompt, output = map(int, name.split("/"))
            self.sizes = [Arrival(0.0, prompt, output)]
        self.prompt = round(sum(size.input for size in self.sizes) / len(self.sizes))
        self.output = sum(size.output for size in self.sizes) / len(self.sizes)
        self.slo = Slo(
            5e3 * COST.prefill_s(self.prompt), 1.5e3 * COST.decode_step_s(1, self.prompt), SHARE
        )
        self._seconds, self._seed = seconds, seed

    @property
    def most(self) -> float:
        """Requests/s that eight workers cannot have, who compute only prompts, or only decode."""
        decode = self.output * COST.decode_step_s(256, 256 * self.prompt) / 256
        return 8 / max(COST.prefill_s(self.prompt), decode) * 1.1

    def run(self, pool: list[WorkerSpec], policy: Policy, rate: float) -> Outcome:
        count = min(max(LEAST, round(rate * self._seconds)), MOST)
        rng = np.random.default_rng(self._seed)
        requests = draw(self.sizes, Process(), rng, count=count, rate=rate)
        return simulate(pool, requests, policy=policy, slo=self.slo)

    def goodput(self, pool: list[WorkerSpec], policy: Policy) -> float:
        def attained(rate: float) -> float:
            outcome = self.run(pool, policy, rate)
            return float(outcome.met(self.slo.ttft_ms / 1e3, self.slo.tpot_ms / 1e3).mean())

        return goodput(attained, SHARE, self.most, self.most / STEPS)

    def best(self, policy: Policy, *counts: tuple[Role, int]) -> tuple[float, int]:
        """Goodput, and the piece size that has it."""
        return max((self.goodput(workers(*counts, piece=piece), policy), piece) for piece in PIECES)


def workers(*counts: tuple[Role, int], piece: int) -> list[WorkerSpec]:
    return [
        WorkerSpec(f"{role}-{n}", role, COST, KV_TOKENS, max_step_tokens=piece, max_sequences=256)
        for role, count in counts
        for n in range(count)
    ]


def split_share(outcome: Outcome) -> float:
    return float((outcome.prefilled != outcome.decoded)[~outcome.refused].mean())


def compare(case: Case) -> dict[str, float]:
    mixed, piece = case.best(POLICIES["least-load"], (Role.MIXED, 8))
    apart, apart_piece = case.best(priced, (Role.PREFILL, 4), (Role.DECODE, 4))
    pool = workers((Role.MIXED, 8), piece=piece)
    together = case.goodput(pool, priced)
    return {
        "ttft_ms": case.slo.ttft_ms,
        "tpot_ms": case.slo.tpot_ms,
        "mixed": mixed,
        "mixed_piece": piece,
        "apart": apart,
        "apart_piece": apart_piece,
        "gain": apart / mixed if mixed else float("inf"),
        "routed": together,
        "routed_whole": case.goodput(pool, whole),
        "routed_splits": split_share(case.run(pool, priced, together)) if together else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulated", action="store_true", required=True)
    parser.add_argument("--sizes", nargs="*", default=[*SIZES, "code"], help="PROMPT/OUTPUT, code")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run (default 60)")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    answer = {}
    if not options.json:
        print(
            f"{'':9}{'8 mixed':>8}{'piece':>6}{'4 + 4':>8}{'piece':>6}{'gain':>6}"
            "   8 routed, whole only, split"
        )
    for name in options.sizes:
        row = answer[name] = compare(Case(name, options.seconds, options.seed))
        if not options.json:
            print(
                f"{name:9}{row['mixed']:8.2f}{row['mixed_piece']:6}{row['apart']:8.2f}"
                f"{row['apart_piece']:6}{row['gain']:6.2f}{row['routed']:11.2f}"
                f"{row['routed_whole']:12.2f}{row['routed_splits']:7.1%}",
                flush=True,
            )
    lost = [name for name, row in answer.items() if row["gain"] < 1]
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        print("dedicated workers lose at:", ", ".join(lost) or "none of these")


if __name__ == "__main__":
    main()
