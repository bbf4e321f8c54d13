"""Mélange's sliced form as PuLP and CBC solve it: a binary for each slice and GPU type.

Run by `bench/planner.py` in an environment that has PuLP. Reads {"loads": [[replicas of type j that
bucket i alone would need]], "prices": [...], "slices": S, "limit": seconds} on standard input,
prints {"status", "cost", "seconds"}. The formulation is the paper's (arXiv 2404.14527, §5.2).
"""

from __future__ import annotations

import json
import sys
import time

import pulp


def main() -> None:
    asked = json.load(sys.stdin)
    start = time.perf_counter()
    program, cost = build(asked["loads"], asked["prices"], asked["slices"])
    program.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=asked["limit"]))
    seconds = time.perf_counter() - start
    status = pulp.LpStatus[program.status]
    late = seconds >= asked["limit"]
    print(
        json.dumps(
            {
                "status": "limit" if late else status,
                "cost": pulp.value(cost),
                "seconds": seconds,
            }
        )
    )


def build(
    loads: list[list[float | None]], prices: list[float], slices: int
) -> tuple[pulp.LpProblem, pulp.LpAffineExpression]:
    program = pulp.LpProblem("sliced", pulp.LpMinimize)
    counts = [pulp.LpVariable(f"B{j}", lowBound=0, cat="Integer") for j in range(len(prices))]
    used: list[list[object]] = [[] for _ in prices]
    for i, row in enumerate(loads):
        for n in range(slices):
            able = [j for j, load in enumerate(row) if load is not None]
            chosen = {j: pulp.LpVariable(f"A{i}_{n}_{j}", cat="Binary") for j in able}
            program += pulp.lpSum(chosen.values()) == 1
            for j, variable in chosen.items():
                used[j].append(variable * (row[j] / slices))
    for j, count in enumerate(counts):
        program += pulp.lpSum(used[j]) <= count
    cost = pulp.lpSum(price * count for price, count in zip(prices, counts, strict=True))
    program.setObjective(cost)
    return program, cost


if __name__ == "__main__":
    main()
