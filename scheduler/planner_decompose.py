"""Many models: what couples them is only the GPUs that they share, so that coupling gets a price.

The relaxation of the whole gives each limit its dual. With GPUs dearer by that, models are planned
one by one: the sum of their least costs, less what the limits are worth, is below every plan's cost
(Lagrange). Then they are planned one by one again, each within what the ones before it took and the
relaxation holds for the ones after it: a plan. The distance between the two is the gap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler.linear import Infeasible, OutOfTime
from scheduler.planner_model import Options, PlanModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.problem import Column, Problem


class Counts(NamedTuple):
    """Replicas by column name; `bound` is below the cost of every plan."""

    replicas: dict[str, int]
    bound: float


def by_model(problem: Problem, options: Options, time_left: Callable[[], float]) -> Counts | None:
    """None where models cannot be told apart, or one by one they do not fit into the limits."""
    names = sorted({bucket.model for bucket in problem.buckets})
    if len(names) < 2 or problem.nodes or options.slices or options.spare:
        return None
    share = msgspec.structs.replace(options, gap=options.gap / 3)
    try:
        duals, held = _relaxed(problem, options)
        bound = _bound(problem, names, duals, share, time_left)
        replicas = _one_by_one(problem, names, held, duals, share, time_left)
    except (Infeasible, OutOfTime):
        return None
    return Counts(replicas, bound)


def _relaxed(problem: Problem, options: Options) -> tuple[list[float], list[float]]:
    """Each limit's dual in $/h per GPU, and the replicas of each column in the relaxation."""
    model = PlanModel(problem, options)
    solution = model.program.relaxed()
    assert solution.duals is not None
    duals = [max(0.0, -float(solution.duals[row])) for row in model.limit_rows]
    return duals, [float(solution.values[y]) for y in model.y]


def _bound(
    problem: Problem,
    names: Sequence[str],
    duals: Sequence[float],
    options: Options,
    time_left: Callable[[], float],
) -> float:
    dearer = msgspec.structs.replace(
        problem,
        columns=tuple(
            msgspec.structs.replace(column, price=column.price + _worth(problem, column, duals))
            for column in problem.columns
        ),
        limits=(),
    )
    total = -math.fsum(dual * limit.gpus for dual, limit in zip(duals, problem.limits, strict=True))
    for at, name in enumerate(names):
        model = PlanModel(_only(dearer, name), options)
        limit = time_left() / (2 * (len(names) - at))
        total += model.program.solve(time_limit=limit, gap=options.gap).bound
    return total


def _worth(problem: Problem, column: Column, duals: Sequence[float]) -> float:
    return column.gpus * sum(
        dual for dual, limit in zip(duals, problem.limits, strict=True) if limit.covers(column)
    )


def _one_by_one(
    problem: Problem,
    names: Sequence[str],
    held: Sequence[float],
    duals: Sequence[float],
    options: Options,
    time_left: Callable[[], float],
) -> dict[str, int]:
    """Models that hold most of what is scarce come first: the last ones fill what is left."""
    weight = dict.fromkeys(names, 0.0)
    for column, count in zip(problem.columns, held, strict=True):
        if column.model in weight:
            weight[column.model] += count * (column.price + _worth(problem, column, duals))
    order = sorted(names, key=lambda name: -weight[name])
    taken = dict(zip((column.name for column in problem.columns), held, strict=True))
    replicas: dict[str, int] = {}
    for at, name in enumerate(order):
        others = [column for column in problem.columns if column.model != name]
        limits = tuple(
            msgspec.structs.replace(
                limit,
                gpus=math.floor(
                    limit.gpus
                    - sum(c.gpus * taken[c.name] for c in others if limit.covers(c))
                    + 1e-6
                ),
            )
            for limit in problem.limits
        )
        part = msgspec.structs.replace(_only(problem, name), limits=limits)
        model = PlanModel(part, options)
        time_limit = time_left() / (2 * (len(names) - at))
        solution = model.program.solve(time_limit=time_limit, gap=options.gap)
        for column, y in zip(part.columns, model.y, strict=True):
            replicas[column.name] = round(float(solution.values[y]))
            taken[column.name] = float(replicas[column.name])
    return replicas


def _only(problem: Problem, name: str) -> Problem:
    """One model's part."""
    return msgspec.structs.replace(
        problem,
        buckets=tuple(bucket for bucket in problem.buckets if bucket.model == name),
        columns=tuple(column for column in problem.columns if column.model == name),
    )
