"""A plan that holds in simulation: planned, simulated, tightened, until the attainment is there.

Capacities are means at full load, and head-room covers the chance of arrivals as if requests were
alike. What that leaves out (queues of long prompts behind each other, hand-overs, the router's
limited sight) the simulation shows; where a limit is missed, the columns of that phase are planned
with less capacity, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist, stdev
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from scheduler.messages import Role
from scheduler.planner import make_plan
from scheduler.simulate import simulate
from scheduler.simulate_coarse import simulate_coarse
from scheduler.simulate_load import draw, parse_process
from scheduler.simulate_plan import plan_workers
from scheduler.simulate_report import Interval, interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from scheduler.capacity import Slo
    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.problem import Column, Problem
    from scheduler.service_file import Demand, Service
    from scheduler.simulate_spec import Outcome, WorkerSpec
    from scheduler.workload import Arrival

SEEDS = 5  # runs of a process; all that is promised rests on their mean and spread
SURE = 0.95  # that a fresh run attains the target too
SECONDS, LEAST, MOST = 150.0, 1500, 8000  # of a run; requests of one, at least and at most
WARM_UP = 0.2  # of a run's requests find the cluster emptier than it will be: not counted
MOST_REPLICAS = 20_000
ROUNDS = 20
GAP = 0.01  # of a tightened plan
COARSE_ERROR = 0.05  # of the fast simulation, which is asked first
STEPS = (1.05, 1.3)  # by which capacity becomes less in a round: by what is lacking
HALVINGS = 3  # of the last step: it may have been longer than needed


class Certificate(msgspec.Struct, frozen=True):
    """`attainment` by model and process, of runs with different draws; see `Interval`.

    `premium`: what the certified plan costs above the one that was simulated first, as a share.
    `reason` says what is in the way of a certificate.
    """

    certified: bool
    attainment: dict[str, dict[str, Interval]]
    premium: float
    rounds: int
    seconds: float
    reason: str = ""


@dataclass(slots=True)
class Tightened:
    """How many times its own capacity each phase of a model is planned with."""

    prefill: float = 1.0
    decode: float = 1.0

    def halfway(self, other: Tightened) -> Tightened:
        """Factors are halved as factors."""
        prefill, decode = self.prefill * other.prefill, self.decode * other.decode
        return Tightened(prefill**0.5, decode**0.5)

    def of(self, role: Role) -> float:
        if role is Role.MIXED:
            return max(self.prefill, self.decode)
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class Shares:
    """Attainment of one run."""

    both: float
    ttft: float
    tpot: float


Runs: TypeAlias = dict[str, dict[str, list[Shares]]]  # by model and process


class Simulate(Protocol):
    """`simulate`, or its fast form."""

    def __call__(
        self, workers: Sequence[WorkerSpec], requests: Sequence[Arrival], *, slo: Slo
    ) -> Outcome: ...


class Certifier:
    """`draws(seed)` gives a generator: the same for the same seed."""

    def __init__(
        self,
        service: Service,
        built: Built,
        clock: Callable[[], float],
        draws: Callable[[int], np.random.Generator],
    ) -> None:
        self.service = service
        self.built = built
        self._clock = clock
        self._draws = draws
        options = built.options
        # Of plans that are about as cheap, any will do: most are thrown away.
        self._options = msgspec.structs.replace(options, gap=max(options.gap, GAP))

    def certify(self, first: Plan) -> tuple[Plan, Certificate]:
        """The first plan, or the first tightened one, that holds; else `first`, and why none."""
        start = self._clock()
        if (count := sum(first.replicas.values())) > MOST_REPLICAS:
            reason = f"{count} replicas: more than {MOST_REPLICAS} are not simulated"
            return first, Certificate(False, {}, 0.0, 0, 0.0, reason)
        missed = tightened = {demand.name: Tightened() for demand in self.service.demands}
        plan, reason = first, ""
        for number in range(1, ROUNDS + 1):
            if plan.shed:
                reason = "it sheds load" if number == 1 else "the limits leave no room to tighten"
                break
            runs, failing = self._tried(plan)
            if not failing:
                plan, runs = self._cheaper(plan, runs, missed, tightened)
                return plan, self._told(plan, first, runs, number, start)
            missed = tightened
            plan, tightened = self._tighter(plan, missed, {name: runs[name] for name in failing})
        else:
            reason = f"{', '.join(failing)} misses its SLO after {ROUNDS} rounds"
        told = self._told(first, first, self.simulate(first, range(1)), number, start)
        return first, msgspec.structs.replace(told, certified=False, reason=reason)

    def _cheaper(
        self, plan: Plan, runs: Runs, missed: dict[str, Tightened], holds: dict[str, Tightened]
    ) -> tuple[Plan, Runs]:
        """The cheapest plan found that holds, of some between the last that missed and this one."""
        for _ in range(HALVINGS if missed is not holds else 0):
            middle = {name: each.halfway(holds[name]) for name, each in missed.items()}
            between = make_plan(tighten(self.built.problem, middle), self._options, self._clock)
            cheaper = between.cost < (1 - GAP) * plan.cost
            tried, failing = self._tried(between) if cheaper else (runs, [])
            if failing:
                missed = middle
                continue
            holds = middle
            if cheaper:
                plan, runs = between, tried
        return plan, runs

    def _tried(self, plan: Plan) -> tuple[Runs, list[str]]:
        """Runs by model and process, and the models that they say no to, as soon as some do."""
        runs = self.simulate(plan, range(1), coarse=True)
        failing = [name for name, shares in runs.items() if self._far_off(name, shares)]
        for seeds in (range(1), range(SEEDS)):
            if not failing:
                runs = self.simulate(plan, seeds)
                failing = [name for name, shares in runs.items() if not self._holds(name, shares)]
        return runs, failing

    def _far_off(self, model: str, runs: dict[str, list[Shares]]) -> bool:
        """Whether the fast simulation says no, beyond its own error."""
        share = self._demand(model).slo.share - COARSE_ERROR
        return any(each.both < share for shares in runs.values() for each in shares)

    def simulate(self, plan: Plan, seeds: Sequence[int], *, coarse: bool = False) -> Runs:
        """A run for each seed."""
        run = simulate_coarse if coarse else simulate
        workers = plan_workers(self.service, self.built, plan)
        return {
            demand.name: {
                process: [
                    self._run(demand, process, workers[demand.name], seed, run) for seed in seeds
                ]
                for process in processes(self.service, demand)
            }
            for demand in self.service.demands
            if workers[demand.name]
        }

    def _run(
        self,
        demand: Demand,
        process: str,
        workers: list[WorkerSpec],
        seed: int,
        simulated: Simulate,
    ) -> Shares:
        generator = self._draws(seed)
        sizes = _from(demand.workload.sizes, generator)
        count, rate = requests_of(demand, process), demand.workload.rate
        load = draw(sizes, parse_process(process), generator, count=count, rate=rate)
        outcome = simulated(workers, load, slo=demand.slo)
        settled = slice(int(count * WARM_UP), None)
        early = outcome.ttft[settled] <= demand.slo.ttft_ms / 1e3
        steady = outcome.tpot[settled] <= demand.slo.tpot_ms / 1e3
        return Shares(*(float(each.mean()) for each in (early & steady, early, steady)))

    def _holds(self, model: str, runs: dict[str, list[Shares]]) -> bool:
        """Whether a fresh run would attain the target too, judging by the spread of these."""
        demand = self._demand(model)
        for process, shares in runs.items():
            counted = requests_of(demand, process) * (1 - WARM_UP)
            both = [each.both for each in shares]
            mean = sum(both) / len(both)
            chance = (mean * (1 - mean) / counted) ** 0.5
            spread = max(chance, stdev(both) if len(both) > 1 else 0.0)
            if mean - NormalDist().inv_cdf(SURE) * spread < demand.slo.share:
                return False
        return True

    def _tighter(
        self,
        plan: Plan,
        tightened: dict[str, Tightened],
        missed: Runs,
    ) -> tuple[Plan, dict[str, Tightened]]:
        """With less capacity for the phases that missed, until the plan is another one."""
        replicas = plan.replicas
        tightened = {name: replace(each) for name, each in tightened.items()}
        for again in range(ROUNDS):
            for model, runs in missed.items():
                worst = min((s for shares in runs.values() for s in shares), key=lambda s: s.both)
                share = self._demand(model).slo.share
                step = min(max(1 + share - worst.both, STEPS[0]) ** (1 + again), STEPS[1])
                # Where neither phase alone is short of what both need, both are.
                wanted = (1 + share) / 2
                early, steady = worst.ttft >= wanted, worst.tpot >= wanted
                tightened[model].prefill *= 1 if early and not steady else step
                tightened[model].decode *= 1 if steady and not early else step
            problem = tighten(self.built.problem, tightened)
            plan = make_plan(problem, self._options, self._clock)
            if plan.replicas != replicas:
                break
        return plan, tightened

    def _told(
        self,
        plan: Plan,
        first: Plan,
        runs: Runs,
        rounds: int,
        start: float,
    ) -> Certificate:
        return Certificate(
            certified=True,
            attainment={
                model: {
                    process: interval(
                        [each.both for each in shares], requests_of(self._demand(model), process)
                    )
                    for process, shares in by_process.items()
                }
                for model, by_process in runs.items()
            },
            premium=plan.cost / first.cost - 1 if first.cost else 0.0,
            rounds=rounds,
            seconds=self._clock() - start,
        )

    def _demand(self, model: str) -> Demand:
        return next(demand for demand in self.service.demands if demand.name == model)


def processes(service: Service, demand: Demand) -> tuple[str, ...]:
    """What the service asks for; else Poisson, and the trace where there is one."""
    if service.choices.certify:
        return service.choices.certify
    return ("poisson", "trace") if demand.workload.traced else ("poisson",)


def requests_of(demand: Demand, process: str) -> int:
    """Of one run: a trace is run once through."""
    if process == "trace":
        return len(demand.workload.arrivals)
    return max(LEAST, min(MOST, round(demand.workload.rate * SECONDS)))


def tighten(problem: Problem, tightened: dict[str, Tightened]) -> Problem:
    """The same problem with less capacity, and less of the link, in each column."""
    columns = tuple(
        _scaled(column, 1 / tightened[column.model].of(column.role)) for column in problem.columns
    )
    return msgspec.structs.replace(problem, columns=columns)


def _scaled(column: Column, factor: float) -> Column:
    return msgspec.structs.replace(
        column,
        capacity={name: rate * factor for name, rate in column.capacity.items()},
        link={name: rate * factor for name, rate in column.link.items()},
    )


def _from(sizes: Sequence[Arrival], generator: np.random.Generator) -> list[Arrival]:
    """A trace that begins somewhere else, so that its runs differ too."""
    at = int(generator.integers(0, len(sizes)))
    period = sizes[-1].at - sizes[0].at
    period += period / max(1, len(sizes) - 1)
    return [*sizes[at:], *_later(sizes[:at], period)]


def _later(arrivals: Sequence[Arrival], seconds: float) -> Iterator[Arrival]:
    return (arrival._replace(at=arrival.at + seconds) for arrival in arrivals)
