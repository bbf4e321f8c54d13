"""From a problem to a plan: the least cost at which all is served, or as much as can be."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler.errors import SetupError
from scheduler.head_room import usable
from scheduler.linear import Infeasible, OutOfTime
from scheduler.messages import Role
from scheduler.plan import SMALL, Plan, shed_keys
from scheduler.planner_decompose import by_model
from scheduler.planner_model import Options, PlanModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.linear import Solution
    from scheduler.problem import Problem

MIN_TIME = 0.05  # s: a solve that starts late still gets this
GAP_SLACK = 1e-6  # the solver's own tolerance
SHED_GAP = 1e-4  # as a share of what must be shed


def make_plan(problem: Problem, options: Options, clock: Callable[[], float]) -> Plan:
    """The plan for a checked problem. `clock` gives seconds; the time limit is held with it.

    Raises SetupError where spares or slices leave no plan within the time limit.
    """
    return _Planner(problem, options, clock).plan()


class _Planner:
    def __init__(self, problem: Problem, options: Options, clock: Callable[[], float]) -> None:
        self.problem = problem
        self.options = options
        self.clock = clock
        self.start = clock()
        self.model = PlanModel(problem, options)

    def plan(self) -> Plan:
        solution = self._cheapest()
        if self.options.spare:
            try:
                solution = self._with_spares(solution)
            except OutOfTime:
                raise SetupError("no plan with spares within the time limit: give more") from None
        counts = [round(float(solution.values[y])) for y in self.model.y]
        shed = {b: _share(solution.values[u]) for b, u in self.model.shed.items()}
        values = self._balanced(counts, shed, solution)
        return self._told(solution, counts, shed, values)

    # ── solving ─────────────────────────────────────────────────────────────────────────────────

    @property
    def _time(self) -> float:
        return max(MIN_TIME, self.options.time_limit - (self.clock() - self.start))

    def _cheapest(self) -> Solution:
        """Serve all if that can be; otherwise shed the least, and of that the cheapest."""
        apart = self._model_by_model()
        if apart and apart.objective - apart.bound <= self.options.gap * apart.objective + SMALL:
            return apart
        try:
            together = self._together()
        except OutOfTime:
            return apart or self._rounded()
        if apart and apart.objective <= together.objective:
            return replace(apart, bound=max(apart.bound, together.bound))
        return together

    def _model_by_model(self) -> Solution | None:
        """Where models share only limits: in a model with these counts, so that shares can be."""
        counts = by_model(self.problem, self.options, lambda: self._time)
        if counts is None:
            return None
        model = PlanModel(self.problem, self.options)
        for column, y in zip(self.problem.columns, model.y, strict=True):
            model.program.fix(y, counts.replicas.get(column.name, 0))
        try:
            solution = model.program.relaxed()
        except Infeasible:  # by a hair: one by one, each was allowed its tolerance
            return None
        return replace(solution, bound=min(solution.objective, counts.bound))

    def _together(self) -> Solution:
        """Raises OutOfTime."""
        try:
            return self.model.program.solve(time_limit=self._time, gap=self.options.gap)
        except Infeasible:
            return self._cheapest_of_least_shed()

    def _cheapest_of_least_shed(self) -> Solution:
        """A third of the time for what must be shed; then the cost, of which that is a solution."""
        model = self.model
        model.shed_least()
        try:
            least = model.program.solve(time_limit=max(MIN_TIME, self._time / 3), gap=SHED_GAP)
        except OutOfTime:
            return self._rounded()
        model.keep_shed(least.objective)
        try:
            return model.program.solve(time_limit=self._time, gap=self.options.gap)
        except (OutOfTime, Infeasible):  # infeasible by a hair: what was shed is known to 1e-9
            return self._priced(least, model.program.relaxed().objective)

    def _priced(self, solution: Solution, bound: float) -> Solution:
        cost = self.model.cost_of(solution.values)
        return replace(solution, objective=cost, bound=min(bound, cost))

    def _rounded(self) -> Solution:
        """The relaxation with its counts rounded up, or down where limits forbid that: poor, but
        soon there, with its distance from the relaxation as the gap."""
        if self.options.slices:
            raise SetupError("no plan within the time limit: give more, or fewer --slices")
        model = self._afresh()
        try:
            relaxed = model.program.relaxed()
            bound = relaxed.objective
        except Infeasible:
            model.shed_least()
            relaxed, bound = model.program.relaxed(), 0.0
        for rounding in (math.ceil, math.floor, _none):
            model = self._afresh()
            for y in model.y:
                model.program.fix(y, rounding(relaxed.values[y]))
            model.shed_least()
            with suppress(Infeasible):
                return self._priced(model.program.relaxed(), bound)
        raise AssertionError("no replicas and everything shed is always a solution")

    def _afresh(self) -> PlanModel:
        self.model = PlanModel(self.problem, self.options)
        return self.model

    def _with_spares(self, solution: Solution) -> Solution:
        """Add, until none is missing, the routing after the loss of one replica of a column.

        Few columns are used, so few of these copies of the routing are ever needed. Raises
        OutOfTime: a plan without its spares would be a promise not kept.
        """
        added: set[int] = set()
        while True:
            if self.clock() - self.start > self.options.time_limit:
                raise OutOfTime
            used = {c for c, y in enumerate(self.model.y) if solution.values[y] > 0.5}
            if used <= added:
                return solution
            for c in sorted(used - added):
                self.model.add_loss(c)
            added |= used
            try:
                solution = self.model.program.solve(time_limit=self._time, gap=self.options.gap)
            except Infeasible:  # the limits leave no room for a spare: serve less
                self.model.shed_least()
                least = self.model.program.solve(time_limit=self._time, gap=0.0)
                self.model.keep_shed(least.objective)
                solution = self.model.program.solve(time_limit=self._time, gap=self.options.gap)

    def _balanced(
        self, counts: list[int], shed: dict[int, float], solution: Solution
    ) -> dict[tuple[int, int], float]:
        """Shares that keep the fullest column emptiest, at the same counts."""
        top = self.options.slices or 1
        as_solved = {pair: float(solution.values[x]) / top for pair, x in self.model.x.items()}
        if self.options.slices or self.options.on_demand:
            return as_solved
        even = PlanModel(self.problem, Options())
        even.balance(counts, shed)
        try:
            values = even.program.relaxed().values
        except Infeasible:  # by less than the tolerance: keep what the solver said
            return as_solved
        return {pair: float(values[x]) for pair, x in even.x.items()}

    # ── telling ─────────────────────────────────────────────────────────────────────────────────

    def _told(
        self,
        solution: Solution,
        counts: list[int],
        shed: dict[int, float],
        shares: dict[tuple[int, int], float],
    ) -> Plan:
        buckets, columns = self.problem.buckets, self.problem.columns
        routing: dict[str, dict[str, float]] = {bucket.name: {} for bucket in buckets}
        for (b, c), share in shares.items():
            if share > SMALL:
                routing[buckets[b].name][columns[c].name] = share
        self._route_idle(routing, counts)
        names = shed_keys(self.problem)
        lost = {
            names[buckets[b].model, buckets[b].name]: share for b, share in shed.items() if share
        }
        cost = self.model.cost_of(solution.values)
        gap = max(0.0, solution.objective - solution.bound) / max(solution.objective, SMALL)
        gap = 0.0 if gap < GAP_SLACK else gap
        proven = gap <= self.options.gap
        return Plan(
            status="partial" if lost else "optimal" if proven else "feasible",
            cost=cost,
            replicas={col.name: n for col, n in zip(columns, counts, strict=True) if n},
            routing=routing,
            shed=lost,
            gap=gap,
            seconds=self.clock() - self.start,
        )

    def _route_idle(self, routing: dict[str, dict[str, float]], counts: list[int]) -> None:
        """Buckets without demand go, should any come, to the running column of most capacity."""
        for bucket in self.problem.buckets:
            if bucket.rate > 0:
                continue
            able = [
                (usable(n, column.burst) * column.capacity[bucket.name], column)
                for n, column in zip(counts, self.problem.columns, strict=True)
                if n and column.model == bucket.model and bucket.name in column.capacity
            ]
            best = {
                role: max((pair for pair in able if pair[1].role is role), default=None, key=_first)
                for role in Role
            }
            chosen = (
                [best[Role.MIXED]] if best[Role.MIXED] else [best[Role.PREFILL], best[Role.DECODE]]
            )
            if all(chosen):
                routing[bucket.name].update({pair[1].name: 1.0 for pair in chosen if pair})


def _first(pair: tuple[float, object]) -> float:
    return pair[0]


def _none(_: float) -> int:
    return 0


def _share(value: float) -> float:
    return 0.0 if value < 1e-7 else min(1.0, float(value))
