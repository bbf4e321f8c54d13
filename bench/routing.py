"""Routing policies on simulated time: goodput of one pool of unlike workers, and regret.

The pool: 2 fast and 4 slow workers, speeds 3:1, links 8:1, the same six for every policy, so the
same cost. Each policy runs in each assignment of roles (and prefix-threshold at each threshold) and
counts with its best. A rate holds when 90 % of the requests meet both limits, over all seeds; a
refused one meets none. The same draws are used at every rate. What the router assumes (how wrong
predictions are, what a hand-over must gain) was chosen on the first half of each trace and seeds
from 500 to 699: the default is the second half, and other seeds.

Regret: decisions to split or not, against those of an oracle that knows the whole future: it starts
from the router's routes and reverses, one by one, each decision whose reversal helps.

    python -m bench.routing
    python -m bench.routing --traces code --requests 400 --seeds 1 2 3 --json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scheduler.capacity import Slo
from scheduler.cost import CostModel
from scheduler.messages import Role
from scheduler.policies import POLICIES, threshold
from scheduler.routing import Chosen, Lanes
from scheduler.simulate import simulate
from scheduler.simulate_load import Process, draw
from scheduler.simulate_report import goodput
from scheduler.simulate_spec import Outcome, WorkerSpec
from scheduler.workload import Arrival, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.pricing import Demand
    from scheduler.routing import Policy

TRACES = Path(__file__).parents[1] / "loadtest/traces"
SHARE = 0.9
# A model of 8 billion parameters: seconds of a step, of a prompt token and its attention, of a
# sequence and its context; 128 KiB of KV cache a token; links of 10 and 80 Gbit/s.
SLOW = CostModel(0.018, 1.5e-4, 6e-9, 1.2e-4, 1.8e-7, "assumed", 131072, 1.25e9)
FAST = CostModel(*SLOW.slower(1 / 3).coefficients, "assumed", 131072, 1e10)
KV_TOKENS = {"fast": 400_000, "slow": 120_000}


class Case(NamedTuple):
    """A trace, and its limits; Mooncake's TTFT was 6 s in first runs, which no policy kept."""

    file: str
    slo: Slo
    most: float  # requests/s that nobody sustains


# TTFT: about three times what a slow worker takes for the code trace's mean prompt; TPOT: three
# lone steps of a slow worker. Mooncake: the limits of its paper (arXiv 2407.00079).
CASES = {
    "code": Case("azure2023_code_0_1200s.csv", Slo(1000, 60), 40.0),
    "conversation": Case("azure2023_conv_0_1200s.csv", Slo(1000, 60), 60.0),
    "mooncake": Case("mooncake_conversation_0_600s.jsonl", Slo(30000, 100), 8.0),
}
M, P, D = Role.MIXED, Role.PREFILL, Role.DECODE
ROLES = {"all mixed": (M, M), "fast prefill": (P, D), "slow prefill": (D, P), "slow decode": (M, D)}
ARMS: dict[str, dict[str, Policy]] = {
    "priced": {"": POLICIES["priced"]},
    "round-robin": {"": POLICIES["round-robin"]},
    "least-load": {"": POLICIES["least-load"]},
    "power-of-two": {"": POLICIES["power-of-two"]},
    "prefix-threshold": {f" at {n}": threshold(n) for n in (256, 1024, 4096)},
}


@dataclass(slots=True)
class Result:
    """The best of one policy on one trace."""

    goodput: float
    roles: str
    attainment: float = 0.0  # at that rate
    refused: float = 0.0
    split: float = 0.0
    others: dict[str, float] = field(default_factory=dict)  # goodput by assignment


def pool(roles: tuple[Role, Role]) -> list[WorkerSpec]:
    kinds = [("fast", roles[0], FAST)] * 2 + [("slow", roles[1], SLOW)] * 4
    return [
        WorkerSpec(f"{kind}-{at}", role, cost, KV_TOKENS[kind], kind=kind)
        for at, (kind, role, cost) in enumerate(kinds)
    ]


class Draws(NamedTuple):
    """The requests of one trace, several times over."""

    name: str
    requests: int
    seeds: tuple[int, ...]
    first: bool = False  # half of the trace, else the second

    def at(self, rate: float) -> list[list[Arrival]]:
        return [_load(self, seed, rate) for seed in self.seeds]


@lru_cache(maxsize=64)
def _load(draws: Draws, seed: int, rate: float) -> list[Arrival]:
    """Mooncake keeps its order, for its prefixes are shared with what is near."""
    sizes = read_trace(TRACES / CASES[draws.name].file)
    middle = len(sizes) // 2
    sizes = sizes[:middle] if draws.first else sizes[middle:]
    rng = np.random.default_rng(seed)
    if not sizes[0].prefix:
        return draw(sizes, Process(), rng, count=draws.requests, rate=rate)
    begin = int(rng.integers(max(1, len(sizes) - draws.requests)))
    window = sizes[begin : begin + draws.requests]
    return draw(window, Process("trace"), rng, count=draws.requests, rate=rate)


def met(outcome: Outcome, slo: Slo) -> float:
    return float(outcome.met(slo.ttft_ms / 1e3, slo.tpot_ms / 1e3).mean())


def best(draws: Draws, policies: dict[str, Policy]) -> Result:
    """Over all assignments of roles."""
    case, result = CASES[draws.name], Result(0.0, "none")
    for label, policy in policies.items():
        for roles, kinds in ROLES.items():
            run = partial(_run, draws, policy, kinds)
            found = goodput(partial(_attained, run, case.slo), SHARE, case.most, case.most / 128)
            result.others[roles + label] = found
            if found > result.goodput:
                outcomes = run(found)
                result.goodput, result.roles = found, roles + label
                result.attainment = _attained(run, case.slo, found)
                result.refused = float(np.mean([o.refused.mean() for o in outcomes]))
                result.split = float(np.mean([(o.prefilled != o.decoded).mean() for o in outcomes]))
    return result


def _attained(run: Callable[[float], list[Outcome]], slo: Slo, rate: float) -> float:
    return float(np.mean([met(outcome, slo) for outcome in run(rate)]))


def _run(draws: Draws, policy: Policy, kinds: tuple[Role, Role], rate: float) -> list[Outcome]:
    slo = CASES[draws.name].slo
    return [simulate(pool(kinds), each, policy=policy, slo=slo) for each in draws.at(rate)]


# ── regret ──────────────────────────────────────────────────────────────────────────────────────

REGRET_ROLES = ("fast prefill", "all mixed")


def dictated(base: Policy, flips: set[int], seen: dict[int, bool]) -> Policy:
    """The base's routes, but for `flips` the best route of the other kind. `seen`: was it split?"""

    def policy(demand: Demand, lanes: Lanes, now: float, draw: Callable[[], float]) -> Chosen:
        chosen = base(demand, lanes, now, draw)
        if demand.number in flips:
            split = chosen.prefill is chosen.decode
            chosen = _other(demand, lanes, now, draw, base, split=split) or chosen
        seen[demand.number] = chosen.prefill is not chosen.decode
        return chosen

    return policy


def _other(
    demand: Demand,
    lanes: Lanes,
    now: float,
    draw: Callable[[], float],
    base: Policy,
    *,
    split: bool,
) -> Chosen | None:
    if not split:
        return base(demand, Lanes((), lanes.decode), now, draw)
    pairs = [(p, d) for p in lanes.prefill for d in lanes.decode if p.may_hand_to(d)]
    if not pairs:
        return None
    prefill, decode = min(
        pairs, key=lambda pair: (pair[0].wait_s(demand.rank, now), pair[1].running)
    )
    return Chosen(prefill, decode)


def regret(draws: Draws, kinds: tuple[Role, Role], rate: float) -> dict[str, float]:
    """Of attainment, with the share of decisions that the oracle reversed; of the first draw."""
    case, requests = CASES[draws.name], draws.at(rate)[0]
    flips: set[int] = set()

    def attained(tried: set[int]) -> float:
        policy = dictated(POLICIES["priced"], tried, {})
        return met(simulate(pool(kinds), requests, policy=policy, slo=case.slo), case.slo)

    router = top = attained(flips)
    for number in range(draws.requests):
        tried = flips | {number}
        if (found := attained(tried)) > top:
            top, flips = found, tried
    return {
        "rate": rate,
        "router": router,
        "oracle": top,
        "regret": 1 - router / top if top else 0.0,
        "reversed": len(flips) / draws.requests,
    }


# ── output ──────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--requests", type=int, default=500, help="of a run (default 500)")
    parser.add_argument("--oracle", type=int, default=150, help="requests of a regret run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[901, 902])
    parser.add_argument("--first", action="store_true", help="half of each trace, not the second")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    answer: dict[str, object] = {}
    for name in options.traces:
        draws = Draws(name, options.requests, tuple(options.seeds), options.first)
        results = {arm: best(draws, policies) for arm, policies in ARMS.items()}
        rates = results["priced"].others  # each pool at the highest rate that it holds
        regrets = {
            roles: regret(draws._replace(requests=options.oracle), ROLES[roles], rates[roles])
            for roles in REGRET_ROLES
        }
        answer[name] = {
            "slo": {"ttft_ms": CASES[name].slo.ttft_ms, "tpot_ms": CASES[name].slo.tpot_ms},
            "goodput": {
                arm: {
                    "requests_s": r.goodput,
                    "best": r.roles,
                    "refused": r.refused,
                    "split": r.split,
                    "by_roles": r.others,
                }
                for arm, r in results.items()
            },
            "regret": regrets,
        }
        if not options.json:
            _print(name, results, regrets)
    if options.json:
        print(json.dumps(answer, indent=1))


def _print(name: str, results: dict[str, Result], regrets: dict[str, dict[str, float]]) -> None:
    slo, priced = CASES[name].slo, results["priced"].goodput
    print(
        f"\n{name}: TTFT ≤ {slo.ttft_ms:g} ms, TPOT ≤ {slo.tpot_ms:g} ms, {SHARE:.0%} of requests"
    )
    print(f"{'policy':18}{'goodput/s':>10}{'priced is':>11}{'refused':>9}{'split':>7}  roles")
    for arm, result in results.items():
        times = f"{priced / result.goodput:.2f} ×" if result.goodput else "-"
        print(
            f"{arm:18}{result.goodput:10.2f}{times:>11}{result.refused:9.1%}"
            f"{result.split:7.0%}  {result.roles}"
        )
    for label, found in regrets.items():
        print(
            f"split or not, {label} at {found['rate']:.1f}/s: router {found['router']:.1%}, oracle "
            f"{found['oracle']:.1%}, regret {found['regret']:.1%}, reversed {found['reversed']:.1%}"
        )


if __name__ == "__main__":
    main()
