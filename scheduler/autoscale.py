"""From the last window's requests and attainment to a new plan, and the steps that lead there.

Events in (`Autoscaler.window`), a `Decision` out; whoever carries it out (a deployer, a simulation)
reports in the next window what runs by then. The plan always covers the most that was needed within
`hold_s`, and a band above it:

    up    at once, when what runs does not serve the forecast within its head-room
    down  when that plan is cheaper by more than switching wastes within `horizon_s`

so a cheaper plan must have been right for all of `hold_s`, and after a switch the load may move by
`band` either way before there is another.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from scheduler.plan import Plan
from scheduler.planner import make_plan
from scheduler.planner_columns import build
from scheduler.planner_model import switching_cost
from scheduler.problem import price_of
from scheduler.rate_forecast import LEAST, Forecast, RateForecast
from scheduler.shares import Planned
from scheduler.shortfall import short_of, unserved
from scheduler.simulate_plan import planned_shares
from scheduler.switching import Running, Stage, switch
from scheduler.workload import SizeBucket, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scheduler.planner_columns import Built
    from scheduler.problem import Problem
    from scheduler.service_file import Autoscaling, Demand, Service

_NONE = (0.0, 0.0, 0.0)

MIX_S = 3600.0  # the mix of sizes is learned over about so long
SURE = 1.64  # standard deviations of chance by which an attainment must miss its target
CORRECT, MOST_CORRECTED = 1.1, 2.0  # the need counts for so much more after a miss, and at most
RELAX = 0.99  # of a correction, in each window that leaves nothing to be desired
RARE = 1e-6  # a size that is this share of all requests was long ago
WORTH = 0.02  # a cheaper plan is cheaper by this share at least: the solver's gap is not a reason


class Seen(msgspec.Struct, frozen=True):
    """What one window saw of a model: sizes × rates, and how many requests met both limits.

    `attainment` is None where nobody asked.
    """

    workload: Workload
    requests: int
    attainment: float | None


class Decision(msgspec.Struct, frozen=True):
    """`plan` is None to keep what runs; `stages` as in `switching`. `due`: what routing wants of
    each column from then on.

    By model: `forecasts`; `corrections`, by which more is planned for since the attainment missed
    its target; and `need`, the requests/s that the plan is for.
    """

    plan: Plan | None
    due: dict[str, Planned]
    stages: tuple[Stage, ...]
    reason: str
    forecasts: dict[str, Forecast]
    corrections: dict[str, float]
    need: dict[str, float]


class Autoscaler:
    """`clock` gives seconds, for the planner's time limit alone."""

    def __init__(self, service: Service, clock: Callable[[], float]) -> None:
        self._service = service
        self._settings = settings = service.autoscale
        self._columns = {column.name: column for column in build(service).problem.columns}
        self._clock = clock
        self._models = {demand.name: _Model(demand, settings) for demand in service.demands}
        windows = max(1, math.ceil(settings.hold_s / settings.window_s))
        self._needs: deque[dict[str, float]] = deque(maxlen=windows)
        self._declined = _Declined()
        self._target: dict[str, int] = {}  # of the last plan

    def window(
        self, seen: Mapping[str, Seen], running: Sequence[Running], ready: Mapping[str, int]
    ) -> Decision:
        """A window is over. `running`: who exists now; `ready`: the replicas of each column that
        served all of the window."""
        self.learn(seen)
        self._judge(seen, ready)
        forecasts = {name: model.forecast for name, model in self._models.items()}
        self._needs.append({name: model.need for name, model in self._models.items()})
        held = {name: max(need[name] for need in self._needs) for name in self._models}
        counts = dict(Counter(w.column for w in running if w.state != "draining"))
        on_the_way = any(worker.state != "ready" for worker in running)
        said = self._planned(counts, held, on_the_way=on_the_way)
        stages: tuple[Stage, ...] = ()
        if said.plan:
            self._target = said.plan.replicas
            stages = self._stages(running, said.plan, self._needs[-1])
        corrections = {name: model.correction for name, model in self._models.items()}
        return Decision(said.plan, said.due, stages, said.reason, forecasts, corrections, held)

    def learn(self, seen: Mapping[str, Seen]) -> None:
        """A window of the past: its load, without a decision."""
        for name, model in self._models.items():
            model.learn(seen[name])

    def problem(self, rates: Mapping[str, float]) -> Problem:
        """The service at these rates, with the mix of sizes that was seen lately."""
        return self._built(self._at(rates)).problem

    def _at(self, rates: Mapping[str, float]) -> Service:
        demands = tuple(model.at(rates[name]) for name, model in self._models.items())
        return msgspec.structs.replace(self._service, demands=demands)

    def _built(self, service: Service, previous: Mapping[str, int] | None = None) -> Built:
        built = build(service, dict(previous or {}))
        self._columns |= {column.name: column for column in built.problem.columns}
        return built

    def _judge(self, seen: Mapping[str, Seen], ready: Mapping[str, int]) -> None:
        """Whether the capacities kept their word, where they were not asked for more."""
        rates = {name: max(each.workload.rate, LEAST) for name, each in seen.items()}
        enough = unserved(self.problem(rates), ready) == 0
        for name, model in self._models.items():
            model.judge(seen[name], enough=enough)

    def _planned(
        self, counts: dict[str, int], held: dict[str, float], *, on_the_way: bool
    ) -> _Said:
        needed = self.problem(held)
        spare = self._service.choices.spare
        if on_the_way and not short_of(needed, self._target, spare=spare):
            return _Said("the last plan is on its way")
        short = short_of(needed, counts, spare=spare)
        if not short and self._declined.still(counts, held):
            return _Said(self._declined.reason)
        service = self._at({n: rate * (1 + self._settings.band) for n, rate in held.items()})
        built = self._built(service, counts)
        options = msgspec.structs.replace(built.options, wasted=self._wasted)
        plan = make_plan(built.problem, options, self._clock)
        due = planned_shares(service, built, plan.routing)
        left = short_of(needed, plan.replicas, spare=spare)
        if left < short:
            return _Said(f"{short - left:.2f} requests/s more than what runs serves", plan, due)
        cost = price_of(built.problem, counts)
        switching = switching_cost(built.problem, options, plan.replicas)
        if left == short and plan.cost + switching < cost * (1 - WORTH):
            return _Said(f"{cost - plan.cost:.2f} $/h less", plan, due)
        reason = "the limits leave no room for more" if short else "no other plan saves enough"
        self._declined = _Declined(reason, counts, held, self._needs.maxlen or 1)
        return _Said(reason)

    @property
    def _wasted(self) -> float:
        """What a start or a stop wastes of a machine's price, as a share of it over the horizon:
        for each of the two, half of both."""
        settings = self._settings
        return (settings.start_s + settings.drain_s) / 2 / settings.horizon_s

    def _stages(
        self, running: Sequence[Running], plan: Plan, need: dict[str, float]
    ) -> tuple[Stage, ...]:
        problem = self.problem(need)

        def room(replicas: Mapping[str, int]) -> bool:
            return all(
                sum(
                    column.gpus * replicas.get(column.name, 0)
                    for column in self._columns.values()
                    if limit.covers(column)
                )
                <= limit.gpus
                for limit in problem.limits
            )

        return switch(
            running, plan.replicas, self._columns, lambda counts: unserved(problem, counts), room
        )


class _Said(msgspec.Struct):
    reason: str
    plan: Plan | None = None
    due: dict[str, Planned] = {}


@dataclass(slots=True)
class _Declined:
    """Why there was no other plan, for what ran and was needed then.

    For more than that there is none either; looked at again after some windows all the same, since
    the mix of sizes moves too.
    """

    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    needs: dict[str, float] = field(default_factory=dict)
    windows: int = 0

    def still(self, counts: dict[str, int], needs: dict[str, float]) -> bool:
        self.windows -= 1
        return (
            self.windows >= 0
            and self.counts == counts
            and all(rate >= self.needs[name] * (1 - WORTH) for name, rate in needs.items())
        )


class _Model:
    """What is known of one model's load."""

    def __init__(self, demand: Demand, settings: Autoscaling) -> None:
        self._demand = demand
        self._rates = RateForecast(settings.window_s, settings.ahead, settings.cover)
        self._learn = min(1.0, settings.window_s / MIX_S)
        self._mix = _shares(demand.workload)
        self.correction = 1.0
        self.forecast = Forecast(demand.workload.rate, demand.workload.rate, "last window", 0.0)

    @property
    def need(self) -> float:
        return self.forecast.upper * self.correction

    def learn(self, seen: Seen) -> None:
        self.forecast = self._rates.learn(seen.workload.rate)
        if not seen.workload.rate:
            return
        came = _shares(seen.workload)
        mixed = {}
        for name in self._mix.keys() | came.keys():
            old, new = self._mix.get(name, _NONE), came.get(name, _NONE)
            pairs = zip(old, new, strict=True)
            mixed[name] = tuple(a + self._learn * (b - a) for a, b in pairs)
        self._mix = {name: mixed[name] for name in sorted(mixed) if mixed[name][0] > RARE}

    def judge(self, seen: Seen, *, enough: bool) -> None:
        """Less is expected of a replica after a miss that the load does not explain."""
        if seen.attainment is None or not seen.requests:
            return
        share = self._demand.slo.share
        chance = share * (1 - share) * self._demand.workload.dispersion / seen.requests
        if enough and seen.attainment < share - SURE * math.sqrt(chance):
            self.correction = min(MOST_CORRECTED, self.correction * CORRECT)
        elif seen.attainment >= (1 + share) / 2:
            self.correction = max(1.0, self.correction * RELAX)

    def at(self, rate: float) -> Demand:
        """The same demand at this rate."""
        total = math.fsum(share for share, _, _ in self._mix.values())
        buckets = tuple(
            SizeBucket(name, (inputs / share, outputs / share), rate * share / total)
            for name, (share, inputs, outputs) in self._mix.items()
        )
        workload = Workload(buckets, self._demand.workload.dispersion)
        return msgspec.structs.replace(self._demand, workload=workload)


def _shares(workload: Workload) -> dict[str, tuple[float, ...]]:
    """By bucket: its share of all requests, and that share times its mean sizes in tokens."""
    return {
        bucket.name: (share, share * bucket.size[0], share * bucket.size[1])
        for bucket in workload.buckets
        if (share := bucket.rate / workload.rate)
    }
