"""Why this plan: what binds, what more of it would save, what the SLO costs, what would suffice.

Every figure is the difference of two plans, solved the same way, never a dual: replicas are whole,
so a price at the margin says little about the next GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from scheduler.messages import Role
from scheduler.plan import SMALL, shed_rate
from scheduler.planner_columns import MOST_MISSES, with_slo
from scheduler.suffice import Context, Name, Suffices, Unserved, mean, suffices, unserved

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.problem import Limit, Problem
    from scheduler.service_file import Service

LOOSER, TIGHTER = 1.1, 0.9  # of a limit
HALF, TWICE = 0.5, 2.0  # of the share that may be late
NOTHING = 1e-3  # of the rate: what is shed is known no better


class Binding(msgspec.Struct, frozen=True):
    """A limit that is used up. Of `more` GPUs: `saving` in $/h, `served` in requests/s."""

    limit: str
    used: int
    gpus: int
    more: int
    saving: float
    served: float


class SloStep(msgspec.Struct, frozen=True):
    """Another limit, in ms, or `share` of requests in time, each the mean of all models.

    `more` in $/h above the plan, below 0 where it saves; `served` in requests/s more.
    """

    limit: Name
    at: float
    to: float
    more: float
    served: float


class Explanation(msgspec.Struct, frozen=True):
    binding: tuple[Binding, ...]
    slo: tuple[SloStep, ...]
    unserved: tuple[Unserved, ...]
    suffices: Suffices | None
    mixed_only: float | None  # $/h without prefill and decode columns; None: cannot serve all
    split_only: float | None
    one_gpu: dict[str, float | None]  # $/h with one GPU type alone


def explain(service: Service, built: Built, plan: Plan, clock: Callable[[], float]) -> Explanation:
    """Solves the problem twenty times over, each within the service's time limit.

    Twice as often, but for a few seconds at most, where the plan does not serve all.
    """
    context = Context(built, plan, clock)
    gpus = sorted({column.gpu for column in built.problem.columns})
    return Explanation(
        binding=binding(context),
        slo=slo_steps(service, context),
        unserved=unserved(service, built),
        suffices=suffices(service, context) if plan.shed else None,
        mixed_only=_cost_of(context, lambda column: column.role is Role.MIXED),
        split_only=_cost_of(context, lambda column: column.role is not Role.MIXED),
        one_gpu={gpu: _cost_of(context, lambda column, gpu=gpu: column.gpu == gpu) for gpu in gpus},
    )


def binding(context: Context) -> tuple[Binding, ...]:
    """Limits without room for one more replica of some column, where one more changes something."""
    found = []
    problem = context.built.problem
    for at, limit in enumerate(problem.limits):
        inside = [column for column in problem.columns if limit.covers(column)]
        used = sum(column.gpus * context.plan.replicas.get(column.name, 0) for column in inside)
        step = min(column.gpus for column in inside)
        if used + step <= limit.gpus:
            continue
        more = context.solve(_raised(problem, {at: step}))
        saving = context.plan.cost - more.cost
        served = shed_rate(problem, context.plan) - shed_rate(problem, more)
        if saving > context.noise or served > SMALL:
            found.append(Binding(str(limit), used, limit.gpus, step, saving, served))
    return tuple(found)


def slo_steps(service: Service, context: Context) -> tuple[SloStep, ...]:
    """Each limit a tenth tighter and looser; half and twice as many late."""
    misses = max(1 - demand.slo.share for demand in service.demands)
    tried: list[tuple[Name, Service]] = [
        ("TTFT", with_slo(service, ttft=TIGHTER)),
        ("TTFT", with_slo(service, ttft=LOOSER)),
        ("TPOT", with_slo(service, tpot=TIGHTER)),
        ("TPOT", with_slo(service, tpot=LOOSER)),
        ("share", with_slo(service, misses=HALF)),
    ]
    if TWICE * misses <= MOST_MISSES:
        tried.append(("share", with_slo(service, misses=TWICE)))
    found = []
    before = shed_rate(context.built.problem, context.plan)
    rate = sum(bucket.rate for bucket in context.built.problem.buckets)
    for name, other in tried:
        problem, plan = context.under(other)
        served = before - shed_rate(problem, plan)
        more = plan.cost - context.plan.cost
        more = more if abs(more) > context.noise else 0.0
        served = served if abs(served) > NOTHING * rate else 0.0
        found.append(SloStep(name, mean(service, name), mean(other, name), more, served))
    return tuple(found)


def _cost_of(context: Context, keep: Callable[..., bool]) -> float | None:
    """The cost with only the columns that `keep` says; None if more is shed than in the plan."""
    problem = context.built.problem
    kept = tuple(column for column in problem.columns if keep(column))
    left = {column.gpu for column in kept}
    limits: tuple[Limit, ...] = tuple(limit for limit in problem.limits if limit.gpu in left)
    plan = context.solve(msgspec.structs.replace(problem, columns=kept, limits=limits))
    more_shed = shed_rate(problem, plan) > shed_rate(problem, context.plan) + 1e-6
    return None if more_shed else plan.cost


def _raised(problem: Problem, more: dict[int, int]) -> Problem:
    limits = tuple(
        msgspec.structs.replace(limit, gpus=limit.gpus + more.get(at, 0))
        for at, limit in enumerate(problem.limits)
    )
    return msgspec.structs.replace(problem, limits=limits)
