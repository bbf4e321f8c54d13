"""Planner speed: instances of the sizes that are promised, and Mélange's form on CBC beside them.

    python bench/planner.py [--json] [--cbc PYTHON]

`--cbc` names a Python that has PuLP (`python -m venv E && E/bin/pip install pulp`); without it the
comparison is left out, and the table says so. Profiles are made up from a seed, at catalogue-like
prices: small GPUs win small requests, big ones win big requests, as published profiles have it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

from scheduler.messages import Role
from scheduler.plan import violations
from scheduler.plan_command import quiet
from scheduler.planner import make_plan
from scheduler.planner_model import Options
from scheduler.problem import Bucket, Column, Limit, Problem

PRICES = {"L4": 0.70, "A10G": 1.01, "L40S": 1.90, "A100": 3.67, "H100": 7.516}
CBC_LIMIT = 20.0  # s
SLICES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cbc", metavar="PYTHON", help="a Python with PuLP")
    args = parser.parse_args()
    rows = [*small(args.cbc), *medium(), *large()]
    ratios = [row["cbc_seconds"] / row["seconds"] for row in rows if row.get("cbc_seconds")]
    summary = {
        "cbc": (
            {"instances": len(ratios), "geometric_mean_ratio": geometric_mean(ratios)}
            if ratios
            else "left out: no --cbc PYTHON with PuLP was named"
        ),
    }
    if args.json:
        print(json.dumps({"rows": rows, **summary}, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()))
    print(summary["cbc"])


def small(cbc: str | None) -> list[dict[str, object]]:
    """One model, four GPU types, 36 to 100 buckets, to a proven optimum."""
    rows = []
    for side in (6, 10):
        for rate in (8, 32, 128):
            for seed in range(3):
                problem = instance(models=1, side=side, columns=4, rate=rate, seed=seed)
                row = solved(f"{side}x{side} x 4 types, {rate} req/s, seed {seed}", problem, 0.0)
                if cbc:
                    row |= on_cbc(cbc, problem)
                rows.append(row)
    return rows


def medium() -> list[dict[str, object]]:
    """One model, 60 buckets, 36 columns in all three roles, to a proven optimum."""
    return [
        solved(
            f"60 x 36 columns, {rate} req/s, seed {seed}",
            instance(1, side=6, columns=36, rate=rate, seed=seed, roles=True, rows=10),
            0.0,
        )
        for rate in (8, 40)
        for seed in range(3)
    ]


def large() -> list[dict[str, object]]:
    """20 models x 20 configurations; GPUs are short of what the unlimited plan takes."""
    rows = []
    for seed in range(2):
        free = instance(20, side=6, columns=20, rate=20, seed=seed, rows=10)
        with quiet():
            plan = make_plan(free, Options(gap=0.01), time.perf_counter)
        used = dict.fromkeys(PRICES, 0)
        for column in free.columns:
            used[column.gpu] += column.gpus * plan.replicas.get(column.name, 0)
        limits = tuple(
            Limit(gpu, int(count * (0.7 if at % 2 == seed % 2 else 1.7)) + 20)
            for at, (gpu, count) in enumerate(sorted(used.items()))
        )
        problem = Problem(free.buckets, free.columns, limits)
        rows.append(solved(f"20 models x 20, shared limits, seed {seed}", problem, 0.01))
    return rows


def solved(name: str, problem: Problem, gap: float) -> dict[str, object]:
    with quiet():
        plan = make_plan(problem, Options(gap=gap), time.perf_counter)
    assert not violations(problem, plan), violations(problem, plan)
    return {
        "instance": name,
        "seconds": plan.seconds,
        "cost": plan.cost,
        "gap": plan.gap,
        "status": plan.status,
    }


def on_cbc(python: str, problem: Problem) -> dict[str, object]:
    loads = [
        [
            bucket.rate / column.capacity[bucket.name] if bucket.name in column.capacity else None
            for column in problem.columns
        ]
        for bucket in problem.buckets
    ]
    asked = {
        "loads": loads,
        "prices": [column.price for column in problem.columns],
        "slices": SLICES,
        "limit": CBC_LIMIT,
    }
    done = subprocess.run(
        [python, str(Path(__file__).with_name("planner_cbc.py"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=4 * CBC_LIMIT,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    return {f"cbc_{name}": value for name, value in answer.items()}


def instance(
    models: int,
    side: int,
    columns: int,
    rate: float,
    seed: int,
    roles: bool = False,
    rows: int | None = None,
) -> Problem:
    """`rows` x `side` buckets of skewed weights for each model; columns run over types, then TP."""
    draw = random.Random(seed)
    sizes = [(i, o) for i in range(rows or side) for o in range(side)]
    buckets, kinds = [], []
    for model in (f"m{at}" for at in range(models)):
        weights = [draw.random() ** 3 for _ in sizes]
        total = rate * draw.uniform(0.3, 2) if models > 1 else rate
        scale = draw.choice([1, 2, 4, 8]) if models > 1 else 1
        buckets += [
            Bucket(f"{i}.{o}", model, total * weight / sum(weights))
            for (i, o), weight in zip(sizes, weights, strict=True)
        ]
        kinds += [
            column(draw, model, at, sizes, scale, roles, types=4 if columns == 4 else 5)
            for at in range(columns)
        ]
    return Problem(tuple(buckets), tuple(kinds))


def column(
    draw: random.Random,
    model: str,
    at: int,
    sizes: list[tuple[int, int]],
    scale: float,
    roles: bool,
    types: int,
) -> Column:
    role = list(Role)[at % 3] if roles else Role.MIXED
    at = at // 3 if roles else at
    gpus = list(PRICES) if types == 5 else [gpu for gpu in PRICES if gpu != "L40S"]
    gpu, parallel = gpus[at % types], 2 ** (at // types)
    rank = list(PRICES).index(gpu) - 1.5
    base = PRICES[gpu] * parallel**0.9 * 3 / scale * draw.uniform(1, 1.3)
    base *= 1.9 if role is not Role.MIXED else 1
    capacity = {}
    for i, o in sizes:
        size_match = 1 + 0.2 * rank * (i + o - 6) / 10
        rate = base / (1 + 0.3 * i) / (1 + 0.6 * o) * size_match * draw.uniform(0.9, 1.1)
        if rate > 0.02:
            capacity[f"{i}.{o}"] = rate
    name = f"{model} {gpu} x{parallel} {role}"
    return Column(name, model, gpu, parallel, role, PRICES[gpu] * parallel, capacity)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
