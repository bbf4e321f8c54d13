"""Why this plan: what binds, what more of it would save, what the SLO costs, what would suffice.

Every figure is the difference of two plans, solved the same way, never a dual: replicas are whole,
so a price at the margin says little about the next GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler.capacity import tightest
from scheduler.messages import Role
from scheduler.plan import SMALL, shed_rate
from scheduler.planner import make_plan
from scheduler.planner_columns import build, step_profile, with_slo
from scheduler.planner_model import useful_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.planner_model import Options
    from scheduler.problem import Limit, Problem
    from scheduler.service_file import Demand, Service

LOOSER = 1.1  # an SLO's limit is tried at 10 % more


class Binding(msgspec.Struct, frozen=True):
    """A limit that is used up. Of `more` GPUs: `saving` in $/h, `served` in requests/s."""

    limit: str
    used: int
    gpus: int
    more: int
    saving: float
    served: float


class SloCost(msgspec.Struct, frozen=True):
    """What a tenth more of a limit would save: $/h in all, and per ms of all models' mean."""

    limit: str
    looser_ms: float
    saving: float
    saving_per_ms: float


class Unserved(msgspec.Struct, frozen=True):
    """A bucket that no column can serve, and the SLO in ms from which on one could."""

    bucket: str
    size: tuple[float, float]
    ttft_ms: float | None
    tpot_ms: float | None
    on: str  # "" where no memory holds it


class Suffices(msgspec.Struct, frozen=True):
    """The cheapest ways out: more GPUs by limit, at `cost` $/h in all; or less of the rate."""

    gpus: dict[str, int]
    cost: float
    rate: float  # share of the rate that the limits do serve


class Explanation(msgspec.Struct, frozen=True):
    binding: tuple[Binding, ...]
    slo: tuple[SloCost, ...]
    unserved: tuple[Unserved, ...]
    suffices: Suffices | None
    mixed_only: float | None  # $/h without prefill and decode columns; None: cannot serve all
    split_only: float | None
    one_gpu: dict[str, float | None]  # $/h with one GPU type alone


class _Context(NamedTuple):
    built: Built
    plan: Plan
    clock: Callable[[], float]

    def solve(self, problem: Problem, options: Options | None = None) -> Plan:
        return make_plan(problem, options or self.built.options, self.clock)


def explain(service: Service, built: Built, plan: Plan, clock: Callable[[], float]) -> Explanation:
    """Solves the problem some twenty times over, each within the service's time limit."""
    context = _Context(built, plan, clock)
    gpus = sorted({column.gpu for column in built.problem.columns})
    return Explanation(
        binding=binding(context),
        slo=slo_costs(service, context),
        unserved=unserved(service, built),
        suffices=suffices(context) if plan.shed else None,
        mixed_only=_cost_of(context, lambda column: column.role is Role.MIXED),
        split_only=_cost_of(context, lambda column: column.role is not Role.MIXED),
        one_gpu={gpu: _cost_of(context, lambda column, gpu=gpu: column.gpu == gpu) for gpu in gpus},
    )


def binding(context: _Context) -> tuple[Binding, ...]:
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
        if saving > SMALL or served > SMALL:
            found.append(Binding(str(limit), used, limit.gpus, step, saving, served))
    return tuple(found)


def slo_costs(service: Service, context: _Context) -> tuple[SloCost, ...]:
    """Nothing of limits that a tenth more would not make cheaper."""
    found = []
    for name in ("ttft", "tpot"):
        mean = sum(getattr(demand.slo, f"{name}_ms") for demand in service.demands) / len(
            service.demands
        )
        scale = {name: LOOSER}
        looser = build(with_slo(service, **scale), context.built.options.previous)
        plan = context.solve(looser.problem, looser.options)
        more = mean * (LOOSER - 1)
        if len(plan.shed) <= len(context.plan.shed):
            saving = context.plan.cost - plan.cost
            found.append(SloCost(name.upper(), more, saving, saving / more))
    return tuple(found)


def unserved(service: Service, built: Built) -> tuple[Unserved, ...]:
    """Of what is shed, the buckets that are shed for want of any column, limits aside."""
    buckets = built.problem.buckets
    pairs = useful_pairs(built.problem, range(len(buckets)))
    able = {(buckets[b].model, buckets[b].name) for b, _ in pairs}
    return tuple(
        _nearest(service, demand, bucket.name, bucket.size)
        for demand in service.demands
        for bucket in demand.workload.buckets
        if bucket.rate > 0 and (demand.name, bucket.name) not in able
    )


def _nearest(service: Service, demand: Demand, name: str, size: tuple[float, float]) -> Unserved:
    """The hardware on which one such request alone needs the least factor of its SLO."""
    best: tuple[float, str, tuple[float, float]] | None = None
    for offer in service.catalogue.offers:
        if service.choices.gpus and offer.gpu not in service.choices.gpus:
            continue
        gpu = service.catalogue.gpus[offer.gpu]
        for tp in (tp for tp in service.choices.tp if gpu.node % tp == 0):
            steps = step_profile(service, demand, gpu, tp)
            kv_tokens = steps.bounds.kv(demand.model.kv_tokens(gpu, tp))
            alone = tightest(steps, Role.MIXED, kv_tokens, size)
            if alone is None or sum(size) > demand.model.context:
                continue
            factor = max(alone[0] / demand.slo.ttft_ms, alone[1] / demand.slo.tpot_ms)
            if best is None or factor < best[0]:
                best = factor, f"{gpu.name} x{tp}", alone
    if best is None:
        return Unserved(f"{demand.name}/{name}", size, None, None, "")
    ttft, tpot = best[2]
    return Unserved(f"{demand.name}/{name}", size, math.ceil(ttft), math.ceil(tpot), best[1])


def suffices(context: _Context) -> Suffices | None:
    """The cheapest plan without limits says how many GPUs more; bisection, how much rate less.

    None where the limits are not what is missing.
    """
    problem = context.built.problem
    free = context.solve(msgspec.structs.replace(problem, limits=()))
    if len(free.shed) >= len(context.plan.shed) and free.cost <= context.plan.cost + SMALL:
        return None
    used = {
        limit: sum(
            c.gpus * free.replicas.get(c.name, 0) for c in problem.columns if limit.covers(c)
        )
        for limit in problem.limits
    }
    more = {str(limit): n - limit.gpus for limit, n in used.items() if n > limit.gpus}
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        scaled = tuple(
            msgspec.structs.replace(bucket, rate=bucket.rate * middle) for bucket in problem.buckets
        )
        plan = context.solve(msgspec.structs.replace(problem, buckets=scaled))
        if len(plan.shed) <= len(free.shed):
            low = middle
        else:
            high = middle
    return Suffices(more, free.cost, low)


def _cost_of(context: _Context, keep: Callable[..., bool]) -> float | None:
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
