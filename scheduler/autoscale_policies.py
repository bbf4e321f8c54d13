"""What an autoscaler is compared with: the peak's plan all day, foresight, and a threshold."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.simulate_plan import planned_shares
from scheduler.switching import switch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scheduler.autoscale import Autoscaler, Decision, Seen
    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.problem import Column
    from scheduler.service_file import Service
    from scheduler.shares import Planned
    from scheduler.switching import Running, Stage

SYNC_S, STABLE_S, TOLERANCE = 60.0, 300.0, 0.1


class RatePlan(NamedTuple):
    """`due`: what routing wants of each column."""

    plan: Plan
    due: dict[str, Planned] | None


class Ours:
    """The autoscaler, and what it has said so far."""

    def __init__(self, autoscaler: Autoscaler, first: RatePlan, window_s: float) -> None:
        self.window_s = window_s
        self.due = first.due
        self.decisions: list[Decision] = []
        self._autoscaler = autoscaler

    def decide(
        self, seen: Mapping[str, Seen], running: Sequence[Running], ready: Mapping[str, int]
    ) -> tuple[Stage, ...]:
        self.decisions.append(self._autoscaler.window(seen, running, ready))
        if self.decisions[-1].plan:
            self.due = self.decisions[-1].due
        return self.decisions[-1].stages


class Static:
    """Nothing ever changes."""

    def __init__(self, plan: RatePlan, window_s: float) -> None:
        self.window_s = window_s
        self.due = plan.due

    def decide(
        self, seen: Mapping[str, Seen], running: Sequence[Running], ready: Mapping[str, int]
    ) -> tuple[Stage, ...]:
        return ()


class Foresight:
    """The least cost of each window, for the rate that then comes.

    Meant for machines that start and stop in no time: a bound, not something that could run.
    """

    def __init__(self, plans: Sequence[RatePlan], built: Built, window_s: float) -> None:
        self.window_s = window_s
        self.due = plans[0].due
        self._plans = deque(plans[1:])
        self._columns = {column.name: column for column in built.problem.columns}

    def decide(
        self, seen: Mapping[str, Seen], running: Sequence[Running], ready: Mapping[str, int]
    ) -> tuple[Stage, ...]:
        if not self._plans:
            return ()
        plan, self.due = self._plans.popleft()
        return _change(running, plan.replicas, self._columns)


class Threshold:
    """Kubernetes' horizontal pod autoscaler, for each column of the peak's plan by itself.

    Wanted are ceil(ready × utilisation / target) replicas, at least one, if the ratio is beyond a
    tolerance of 10 %; never fewer than was wanted in the last 5 minutes (the defaults of its
    documentation, looked at once a minute). Routing knows of no plan.
    """

    window_s = SYNC_S
    due: dict[str, Planned] | None = None

    def __init__(self, built: Built, plan: Plan, target: float) -> None:
        self._target = target
        self._columns = {column.name: column for column in built.problem.columns}
        self._wanted = {
            column: deque[int](maxlen=round(STABLE_S / SYNC_S)) for column in plan.replicas
        }
        self._loads = {name: self._load(built, plan, name) for name in plan.replicas}

    def decide(
        self, seen: Mapping[str, Seen], running: Sequence[Running], ready: Mapping[str, int]
    ) -> tuple[Stage, ...]:
        now = Counter(worker.column for worker in running if worker.state != "draining")
        wanted = {}
        for column, asked in self._wanted.items():
            serving = max(1, ready.get(column, 0))
            came = seen[self._columns[column].model].workload.rate
            ratio = self._loads[column] * came / serving / self._target
            within = abs(ratio - 1) <= TOLERANCE
            asked.append(now[column] if within else max(1, math.ceil(serving * ratio)))
            wanted[column] = max(asked) if max(asked) < now[column] else asked[-1]
        return _change(running, wanted, self._columns)

    def _load(self, built: Built, plan: Plan, name: str) -> float:
        """Replicas' capacity that the column's share of one request/s of its model takes."""
        column = self._columns[name]
        asked = [bucket for bucket in built.problem.buckets if bucket.model == column.model]
        return sum(
            bucket.rate * plan.routing[bucket.name].get(name, 0.0) / capacity
            for bucket in asked
            if (capacity := column.capacity.get(bucket.name))
        ) / sum(bucket.rate for bucket in asked)


def _change(
    running: Sequence[Running], wanted: Mapping[str, int], columns: Mapping[str, Column]
) -> tuple[Stage, ...]:
    """Whatever the load."""
    return switch(running, wanted, columns, lambda replicas: 0.0, lambda replicas: True)


class RateTable:
    """Plans of a service by rate, each made once for all rates of one step."""

    def __init__(self, service: Service, clock: Callable[[], float], step: float = 0.02) -> None:
        self._service, self._clock, self._step = service, clock, step
        self._plans: dict[tuple[int, ...], RatePlan] = {}

    def plan(self, rates: Mapping[str, float]) -> RatePlan:
        """For rates that are at most one step above."""
        key = tuple(
            math.ceil(math.log(max(rates[demand.name], 1e-3)) / self._step)
            for demand in self._service.demands
        )
        if key not in self._plans:
            demands = tuple(
                msgspec.structs.replace(
                    demand,
                    workload=demand.workload.scaled(
                        math.exp(at * self._step) / demand.workload.rate
                    ),
                )
                for at, demand in zip(key, self._service.demands, strict=True)
            )
            service = msgspec.structs.replace(self._service, demands=demands)
            built = build(service)
            plan = make_plan(built.problem, built.options, self._clock)
            self._plans[key] = RatePlan(plan, planned_shares(service, built, plan.routing))
        return self._plans[key]
