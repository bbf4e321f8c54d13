"""What a set of replicas cannot serve of a load, however it is routed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from scheduler.head_room import usable
from scheduler.planner_model import Options, PlanModel, useful_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scheduler.problem import Problem

SMALL = 1e-6  # requests/s: the solver's rounding


def short_of(problem: Problem, replicas: Mapping[str, int], *, spare: bool) -> float:
    """`unserved`; with `spare`, the most of it after the loss of any one replica."""
    if not spare:
        return unserved(problem, replicas)
    names = [name for name, count in sorted(replicas.items()) if count > 0]
    lost = [{**replicas, name: replicas[name] - 1} for name in names]
    return max((unserved(problem, left) for left in lost), default=unserved(problem, {}))


def unserved(problem: Problem, replicas: Mapping[str, int]) -> float:
    """Requests/s beyond what these replicas serve within their head-room; 0 if all fits.

    `replicas` by column name; limits are not looked at, nor buckets that no column can serve.
    """
    able = {b for b, _ in useful_pairs(problem, range(len(problem.buckets)))}
    if not able:
        return 0.0
    running = [column for column in problem.columns if replicas.get(column.name, 0) > 0]
    model = PlanModel(
        msgspec.structs.replace(
            problem,
            buckets=tuple(problem.buckets[b] for b in sorted(able)),
            # Head-room is a number here, not a choice that the program would make.
            columns=tuple(msgspec.structs.replace(column, burst=0.0) for column in running),
            limits=(),
            nodes=(),
        ),
        Options(),
    )
    counts = [replicas[column.name] for column in running]
    room = [usable(replicas[column.name], column.burst) for column in running]
    model.serve_with(counts, room)
    left = model.program.relaxed().objective
    return left if left > SMALL else 0.0
