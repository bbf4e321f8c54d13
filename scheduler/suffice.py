"""What would serve all that a plan sheds: more GPUs, a looser SLO, less of the rate.

Each way is found by planning again, so its figure is that of a plan.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from scheduler.capacity import tightest
from scheduler.messages import Role
from scheduler.plan import SMALL
from scheduler.planner import make_plan
from scheduler.planner_columns import build, step_profile, with_slo
from scheduler.planner_model import useful_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.planner_model import Options
    from scheduler.problem import Problem
    from scheduler.service_file import Demand, Service

Name = Literal["TTFT", "TPOT", "share"]
LOOSEST, HALVINGS = 16.0, 6  # times a limit, tried for what cannot be served; to 4 %
QUICK_S, QUICK_GAP = 10.0, 0.005  # of such a try


class Context(NamedTuple):
    built: Built
    plan: Plan
    clock: Callable[[], float]

    def solve(self, problem: Problem, options: Options | None = None) -> Plan:
        return make_plan(problem, options or self.built.options, self.clock)

    def under(self, service: Service, *, quick: bool = False) -> tuple[Problem, Plan]:
        """The plan of a service that asks for something else."""
        options = self.built.options
        if quick and not options.spare:
            options = msgspec.structs.replace(
                options,
                time_limit=min(options.time_limit, QUICK_S),
                gap=max(options.gap, QUICK_GAP),
            )
        problem = build(service, options.previous).problem
        return problem, self.solve(problem, options)

    @property
    def noise(self) -> float:
        """$/h by which plans differ for no reason: they are solved to a gap."""
        return max(SMALL, self.plan.gap * self.plan.cost)


class Unserved(msgspec.Struct, frozen=True):
    """A bucket that no column can serve, and the SLO in ms from which on one could."""

    bucket: str
    size: tuple[float, float]
    ttft_ms: float | None
    tpot_ms: float | None
    on: str  # "" where no memory holds it


class Relaxed(msgspec.Struct, frozen=True):
    """The SLO, about the tightest of its kind, under which all is served, for `cost` $/h.

    `limits` are those that are looser, by `factor`; the mean of all models in ms.
    """

    limits: tuple[Name, ...]
    factor: float
    ttft_ms: float
    tpot_ms: float
    cost: float


class Suffices(msgspec.Struct, frozen=True):
    """Ways to serve all, each by itself: more GPUs, a looser SLO, less of the rate.

    `gpus` more, by limit, make it `cost` $/h in all; None where limits are not what is missing.
    """

    gpus: dict[str, int]
    cost: float | None
    relaxed: tuple[Relaxed, ...]  # the cheapest first
    rate: float  # share of the rate that is served whole; 0 where no rate is


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


def suffices(service: Service, context: Context) -> Suffices:
    """The cheapest plan without limits says how many GPUs more; bisection, the other ways."""
    problem = context.built.problem
    free = context.solve(msgspec.structs.replace(problem, limits=()))
    ways: tuple[tuple[Name, ...], ...] = (("TPOT",), ("TTFT",), ("TTFT", "TPOT"))
    relaxed = [found for way in ways if (found := _relaxed(service, context, way))]
    needless = {each.limits for each in relaxed if len(each.limits) == 1}
    relaxed = [each for each in relaxed if len(each.limits) == 1 or not needless]
    limited = not free.shed or free.cost > context.plan.cost + SMALL
    return Suffices(
        gpus=_missing(problem, free) if limited else {},
        cost=free.cost if limited and not free.shed else None,
        relaxed=tuple(sorted(relaxed, key=lambda each: each.cost)),
        rate=_rate(context),
    )


def _missing(problem: Problem, free: Plan) -> dict[str, int]:
    """GPUs that a plan without limits has beyond each of them."""
    used = {
        limit: sum(
            c.gpus * free.replicas.get(c.name, 0) for c in problem.columns if limit.covers(c)
        )
        for limit in problem.limits
    }
    return {str(limit): n - limit.gpus for limit, n in used.items() if n > limit.gpus}


def _rate(context: Context) -> float:
    """The most of the rate that is served whole."""
    problem = context.built.problem

    def serves(share: float) -> bool:
        scaled = tuple(
            msgspec.structs.replace(bucket, rate=bucket.rate * share) for bucket in problem.buckets
        )
        return not context.solve(msgspec.structs.replace(problem, buckets=scaled)).shed

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def _relaxed(service: Service, context: Context, limits: tuple[Name, ...]) -> Relaxed | None:
    """These limits made looser until all is served; None where no such factor is enough."""

    def tried(factor: float) -> tuple[Service, Plan]:
        by = {name.lower(): factor for name in limits}
        other = with_slo(service, **by)
        return other, context.under(other, quick=True)[1]

    found = *tried(LOOSEST), LOOSEST
    if found[1].shed:
        return None
    low, high = 1.0, LOOSEST
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        other, plan = tried(middle)
        if plan.shed:
            low = middle
        else:
            high, found = middle, (other, plan, middle)
    other, plan, factor = found
    return Relaxed(limits, factor, mean(other, "TTFT"), mean(other, "TPOT"), plan.cost)


def mean(service: Service, limit: Name) -> float:
    field = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "share": "share"}[limit]
    values = [getattr(demand.slo, field) for demand in service.demands]
    return float(sum(values) / len(values))
