"""Cost against what is asked for: how much a tighter or looser limit, or another rate, would cost.

Each axis changes one thing of the service by factors and plans anew. A plan for more is a plan for
less too, so of each axis the cost never rises as less is asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from scheduler.plan import SMALL, shed_rate
from scheduler.planner import make_plan
from scheduler.planner_columns import MOST_MISSES, build, with_slo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scheduler.certify import Certificate
    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.service_file import Demand, Service

Unit = Literal["share", "ms", "requests/s", "×"]
LIMITS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
MISSES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # of the share that may be late
RATES = (4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
SOLVE_S, GAP = 10.0, 0.005  # of each plan: a curve needs no more


class Axis(NamedTuple):
    """`factors` from the most that is asked for to the least; 1 is the service as it is."""

    name: str
    factors: Sequence[float]
    scaled: Callable[[Service, float], Service]
    value: Callable[[Demand], float]
    unit: Unit


class Certified(msgspec.Struct, frozen=True):
    """What simulation says of a point: `cost` in $/h of the plan that `holds`."""

    holds: bool
    cost: float
    replicas: dict[str, int]
    attained: float  # the least over models and arrival processes


class Point(msgspec.Struct, frozen=True):
    """A plan of an axis. `value` in the axis's unit; `cost` in $/h, of which `by_gpu`."""

    factor: float
    value: float
    cost: float
    by_gpu: dict[str, float]
    replicas: dict[str, int]
    shed: float  # share of the requests
    gap: float
    certified: Certified | None = None


class Curve(msgspec.Struct, frozen=True):
    """`points` from the most that is asked for to the least; `model` where there is just one."""

    name: str
    unit: Unit
    model: str
    points: tuple[Point, ...]

    @property
    def asked(self) -> Point:
        """The service as it is."""
        return next(point for point in self.points if point.factor == 1)


class Task(NamedTuple):
    """One point that is to be planned, with the service that it is of."""

    axis: Axis
    factor: float
    service: Service


def tasks(service: Service) -> list[Task]:
    """Every point of every axis but the one that they share: the service as it is."""
    return [
        Task(axis, factor, axis.scaled(service, factor))
        for axis in axes(service)
        for factor in axis.factors
        if factor != 1
    ]


def axes(service: Service) -> tuple[Axis, ...]:
    misses = max(1 - demand.slo.share for demand in service.demands)
    return (
        Axis(
            "attainment",
            _allowed(misses),
            lambda s, by: with_slo(s, misses=by),
            lambda d: d.slo.share,
            "share",
        ),
        Axis("TTFT", LIMITS, lambda s, by: with_slo(s, ttft=by), lambda d: d.slo.ttft_ms, "ms"),
        Axis("TPOT", LIMITS, lambda s, by: with_slo(s, tpot=by), lambda d: d.slo.tpot_ms, "ms"),
        Axis("rate", RATES, _scaled_rate, lambda d: d.workload.rate, "requests/s"),
    )


def solve(task: Task, previous: dict[str, int], clock: Callable[[], float]) -> tuple[Built, Plan]:
    """As the service itself is planned, in less time where that leaves a plan at all."""
    built = build(task.service, previous)
    options = built.options
    limit = options.time_limit if options.spare else min(options.time_limit, SOLVE_S)
    quick = msgspec.structs.replace(options, time_limit=limit, gap=max(options.gap, GAP))
    built = built._replace(options=quick)
    return built, make_plan(built.problem, quick, clock)


def point(
    service: Service,
    axis: Axis,
    factor: float,
    built: Built,
    plan: Plan,
    certificate: tuple[Plan, Certificate] | None = None,
) -> Point:
    """`service` is as it is, `built` as the point has it."""
    columns = {column.name: column for column in built.problem.columns}
    by_gpu: dict[str, float] = {}
    for name, count in plan.replicas.items():
        gpu = columns[name].gpu
        by_gpu[gpu] = by_gpu.get(gpu, 0.0) + count * columns[name].price
    rate = sum(bucket.rate for bucket in built.problem.buckets)
    return Point(
        factor=factor,
        value=_value(service, axis, factor),
        cost=plan.cost,
        by_gpu=by_gpu,
        replicas=plan.replicas,
        shed=shed_rate(built.problem, plan) / rate if rate else 0.0,
        gap=plan.gap,
        certified=certified(*certificate) if certificate else None,
    )


def certified(plan: Plan, certificate: Certificate) -> Certified:
    attained = [
        held.mean for processes in certificate.attainment.values() for held in processes.values()
    ]
    return Certified(certificate.certified, plan.cost, plan.replicas, min(attained, default=0.0))


def curve(service: Service, axis: Axis, points: Sequence[Point]) -> Curve:
    """Where a plan for more serves as well and is cheaper, it is the plan for less."""
    model = service.demands[0].name if len(service.demands) == 1 else ""
    return Curve(axis.name, _unit(service, axis), model, tuple(_front(points)))


def nearest_first(tasks: Sequence[Task]) -> list[int]:
    """In which order points are certified while there is time: what is nearly asked for first."""
    return sorted(range(len(tasks)), key=lambda at: abs(math.log(tasks[at].factor)))


def _front(points: Sequence[Point]) -> Iterator[Point]:
    best: Point | None = None
    sure: Certified | None = None
    for each in points:
        if best and best.cost < each.cost and best.shed <= each.shed + SMALL:
            taken = {name: getattr(best, name) for name in ("cost", "by_gpu", "replicas", "shed")}
            each = msgspec.structs.replace(each, **taken)
        best = each
        if (holding := each.certified) and holding.holds:
            if sure and sure.cost < holding.cost:
                each = msgspec.structs.replace(each, certified=sure)
            sure = each.certified
        yield each


def _allowed(misses: float) -> list[float]:
    return [factor for factor in MISSES if factor <= 1 or factor * misses <= MOST_MISSES]


def _scaled_rate(service: Service, factor: float) -> Service:
    return msgspec.structs.replace(
        service,
        demands=tuple(
            msgspec.structs.replace(demand, workload=demand.workload.scaled(factor))
            for demand in service.demands
        ),
    )


def _unit(service: Service, axis: Axis) -> Unit:
    """Where models ask for unlike limits a point is known by its factor."""
    alike = len({axis.value(demand) for demand in service.demands}) == 1
    return axis.unit if alike or axis.name == "rate" else "×"


def _value(service: Service, axis: Axis, factor: float) -> float:
    if _unit(service, axis) == "×":
        return factor
    scaled = axis.scaled(service, factor)
    values = [axis.value(demand) for demand in scaled.demands]
    return sum(values) if axis.name == "rate" else values[0]
