"""One day of requests under several policies: what each costs, and what it attains."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from scheduler.autoscale import Autoscaler, Decision, Seen
from scheduler.autoscale_policies import Foresight, Ours, RateTable, Static, Threshold
from scheduler.planner_columns import build
from scheduler.rate_curve import Curve, draw
from scheduler.simulate_day import Day, DayReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from scheduler.service_file import Service

OURS, STATIC, FORESIGHT, THRESHOLD = "autoscale", "peak all day", "foresight", "threshold"


class Change(msgspec.Struct, frozen=True):
    """At `at` seconds of the day: why there was another plan, and the steps by action."""

    at: float
    reason: str
    cost: float
    replicas: dict[str, int]
    steps: dict[str, int]


class Told(msgspec.Struct, frozen=True):
    """How good the forecasts were: `error` is the mean of |forecast - came| / came, of the highest
    of the windows that each was for; `naive` is that of the last window. `covered`: the share of
    them that were at most the upper bound. `sources`: how often each was taken."""

    error: float
    naive: float
    covered: float
    sources: dict[str, int]


class Comparison(msgspec.Struct, frozen=True):
    """`days` by policy. `forecasts` by model."""

    rate: float
    share: float
    days: dict[str, DayReport]
    changes: list[Change]
    forecasts: dict[str, Told]
    seconds: float


def compare(
    service: Service,
    past: Curve | None,
    curve: Curve,
    *,
    rate: float,
    burstiness: float,
    target: float,
    generator: np.random.Generator,
    clock: Callable[[], float],
) -> Comparison:
    """Each model's rate follows the curve; the mean of all of them together is `rate`."""
    begun, window = clock(), service.autoscale.window_s
    built = build(service)
    total = sum(demand.workload.rate for demand in service.demands)
    parts = {d.name: rate / curve.mean * d.workload.rate / total for d in service.demands}

    def day(of: Curve) -> Day:
        requests = {
            each.name: draw(
                each.workload.sizes, of.scaled(of.mean * parts[each.name]), burstiness, generator
            )
            for each in service.demands
        }
        return Day(service, built, requests, of.times[-1])

    autoscaler = Autoscaler(service, clock)
    history = list(_windows(day(past), window)) if past else []
    for seen in history:
        autoscaler.learn(seen)
    today = day(curve)
    windows = list(_windows(today, window))
    table = RateTable(service, clock)
    plans = [table.plan(_rates(seen)) for seen in windows]
    peak = table.plan({name: max(_rates(seen)[name] for seen in windows) for name in parts})
    ours, first = Ours(autoscaler, plans[0], window), plans[0].plan.replicas
    threshold, most = Threshold(built, peak.plan, target), peak.plan.replicas
    days = {
        OURS: today.run(ours, first),
        FORESIGHT: today.run(Foresight(plans, built, window), first, at_once=True),
        THRESHOLD: today.run(threshold, most),
        STATIC: today.run(Static(peak, window), most),
    }
    decided, ahead = ours.decisions, service.autoscale.ahead
    return Comparison(
        rate=rate,
        share=min(demand.slo.share for demand in service.demands),
        days=days,
        changes=[
            _change((at + 1) * window, each) for at, each in enumerate(decided) if each.stages
        ],
        forecasts={
            name: _told(name, [_rates(seen)[name] for seen in windows], decided, ahead)
            for name in parts
        },
        seconds=clock() - begun,
    )


def _windows(day: Day, window: float) -> Sequence[dict[str, Seen]]:
    return [
        day.seen(at * window, min(day.end, (at + 1) * window))
        for at in range(math.ceil(day.end / window))
    ]


def _rates(seen: Mapping[str, Seen]) -> dict[str, float]:
    return {name: each.workload.rate for name, each in seen.items()}


def _change(at: float, decision: Decision) -> Change:
    plan = decision.plan
    assert plan is not None, "steps lead to a plan"
    steps = Counter(f"{step.action}" for stage in decision.stages for step in stage)
    return Change(at, decision.reason, plan.cost, plan.replicas, dict(steps))


def _told(name: str, rates: Sequence[float], decisions: Sequence[Decision], ahead: int) -> Told:
    errors, naive, covered = [], [], 0
    for at in range(len(rates) - ahead):
        came = max(rates[at + 1 : at + 1 + ahead])
        if not came:
            continue
        forecast = decisions[at].forecasts[name]
        errors.append(abs(forecast.rate / came - 1))
        naive.append(abs(rates[at] / came - 1))
        covered += forecast.upper >= came
    many = max(1, len(errors))
    return Told(
        error=sum(errors) / many,
        naive=sum(naive) / many,
        covered=covered / many,
        sources=dict(Counter(decision.forecasts[name].source for decision in decisions)),
    )
