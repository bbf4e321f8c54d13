"""The answer: how many replicas of which column, and the share of each bucket that goes to each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from scheduler.messages import Role

if TYPE_CHECKING:
    from scheduler.problem import Problem

Status = Literal["optimal", "feasible", "partial"]
SMALL = 1e-9  # shares below are the solver's rounding


class Plan(msgspec.Struct, frozen=True):
    """What `motley plan --json` prints.

    `status`: `optimal` (within the gap asked for), `feasible` (time ran out first), or `partial`
    (some demand is in `shed`: served is as much as can be, then at the least cost). `cost` in $/h;
    `gap`: the cost is proven to be at most this share above the least. `routing` by bucket, then by
    column: prefill and mixed columns sum to what is served, and so do decode and mixed ones; `shed`
    by bucket, as a share. A bucket's name that several models use is written `model/bucket` in
    `shed`; in `routing` columns tell the models apart.
    """

    status: Status
    cost: float
    replicas: dict[str, int]
    routing: dict[str, dict[str, float]]
    shed: dict[str, float]
    gap: float
    seconds: float


def violations(problem: Problem, plan: Plan, tolerance: float = 1e-6) -> list[str]:
    """Every promise of the plan that its own numbers break, in words; empty when it holds.

    Head-room, spare replicas and shares by market are not looked at: a plan without them is a plan.
    """
    wrong = []
    shed_names = shed_keys(problem)
    for bucket in problem.buckets:
        if bucket.rate == 0:
            continue
        shed = plan.shed.get(shed_names[bucket.model, bucket.name], 0.0)
        shares = plan.routing[bucket.name]
        for left_out in (Role.DECODE, Role.PREFILL):
            served = sum(
                shares.get(column.name, 0.0)
                for column in problem.columns
                if column.model == bucket.model and column.role is not left_out
            )
            if abs(served + shed - 1) > tolerance:
                wrong.append(f"{bucket.model}/{bucket.name}: shares sum to {served + shed:g}")
    for column in problem.columns:
        load = sum(
            bucket.rate * plan.routing[bucket.name].get(column.name, 0.0) / capacity
            for bucket in problem.buckets
            if bucket.model == column.model and (capacity := column.capacity.get(bucket.name))
        )
        if load > plan.replicas.get(column.name, 0) + tolerance * max(1.0, load):
            wrong.append(f"{column.name}: load of {load:g} replicas")
    for limit in problem.limits:
        used = sum(
            column.gpus * plan.replicas.get(column.name, 0)
            for column in problem.columns
            if limit.covers(column)
        )
        if used > limit.gpus:
            wrong.append(f"{limit}: {used} GPUs of {limit.gpus}")
    return wrong


def shed_rate(problem: Problem, plan: Plan) -> float:
    """requests/s that are not served."""
    names = shed_keys(problem)
    return sum(
        bucket.rate * plan.shed.get(names[bucket.model, bucket.name], 0.0)
        for bucket in problem.buckets
    )


def shed_keys(problem: Problem) -> dict[tuple[str, str], str]:
    """(model, bucket) → its name in `Plan.shed`."""
    models: dict[str, set[str]] = {}
    for bucket in problem.buckets:
        models.setdefault(bucket.name, set()).add(bucket.model)
    return {
        (bucket.model, bucket.name): (
            bucket.name if len(models[bucket.name]) == 1 else f"{bucket.model}/{bucket.name}"
        )
        for bucket in problem.buckets
    }
