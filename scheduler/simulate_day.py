"""A day of traffic while machines come and go, under a policy that decides from window to window.

Each stretch of time with one set of ready workers is simulated in the fast form, after a lead-in
that fills it as the stretch before did; requests that wait for their first token at its end wait at
the beginning of the next one. Answers that are under way when a worker goes are taken to end there.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from scheduler.autoscale import Seen
from scheduler.machines import Machines, whole_time
from scheduler.plan_file import PlanFile
from scheduler.simulate_coarse import simulate_coarse
from scheduler.simulate_plan import plan_workers
from scheduler.workload import Arrival, count_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from scheduler.machines import Span
    from scheduler.planner_columns import Built
    from scheduler.service_file import Demand, Service
    from scheduler.shares import Planned
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.switching import Running, Stage

LEAD_S = 30.0


class Policy(Protocol):
    """What decides once in every `window_s`; `due`: what routing wants of each column by now."""

    window_s: float
    due: dict[str, Planned] | None

    def decide(
        self, seen: Mapping[str, Seen], running: Sequence[Running], ready: Mapping[str, int]
    ) -> tuple[Stage, ...]: ...


class WindowReport(msgspec.Struct, frozen=True):
    """From `start` in s: requests/s that came, $/h that were paid, share that met both limits."""

    start: float
    rate: float
    paid: float
    attainment: float
    ready: dict[str, int]


class DayReport(msgspec.Struct, frozen=True):
    """`switches` by action; `worst_hour` is the lowest attainment of a full hour's requests."""

    dollars: float
    gpu_hours: float
    attainment: float
    worst_hour: float
    switches: dict[str, int]
    requests: int
    windows: list[WindowReport]


class Day:
    """The requests of each model, from time 0 to `end` in s."""

    def __init__(
        self, service: Service, built: Built, requests: Mapping[str, Sequence[Arrival]], end: float
    ) -> None:
        self.service, self.built, self.end = service, built, end
        self._columns = {column.name: column for column in built.problem.columns}
        self._lines = {
            demand.name: _Line(service, built, demand, requests[demand.name])
            for demand in service.demands
        }

    def seen(self, start: float, end: float) -> dict[str, Seen]:
        """What came, without what became of it."""
        return {name: line.seen(start, end, None) for name, line in self._lines.items()}

    def run(
        self, policy: Policy, replicas: Mapping[str, int], *, at_once: bool = False
    ) -> DayReport:
        """Begins with these replicas, all ready. `at_once`: no step takes any time."""
        settings = self.service.autoscale
        if at_once:
            settings = msgspec.structs.replace(settings, start_s=0.0, flip_s=0.0, drain_s=0.0)
        machines = Machines(settings, self._columns, replicas)
        for line in self._lines.values():
            line.begin()
        windows: list[WindowReport] = []
        start, paid = 0.0, 0.0
        while start < self.end:
            end = min(self.end, start + policy.window_s)
            spans = machines.advance(end)
            seen = {}
            for name, line in self._lines.items():
                for span in spans:
                    line.serve(span, policy.due)
                seen[name] = line.seen(start, end, line.met)
            windows.append(self._window(start, end, seen, machines.dollars - paid, spans[-1]))
            paid = machines.dollars
            machines.carry_out(policy.decide(seen, machines.running, whole_time(spans)))
            start = end
        return self._report(machines, windows)

    def _window(
        self, start: float, end: float, seen: Mapping[str, Seen], dollars: float, span: Span
    ) -> WindowReport:
        came = sum(each.requests for each in seen.values())
        met = sum(each.requests * (each.attainment or 0.0) for each in seen.values())
        return WindowReport(
            start=start,
            rate=came / (end - start),
            paid=dollars / (end - start) * 3600,
            attainment=met / came if came else 1.0,
            ready=span.ready,
        )

    def _report(self, machines: Machines, windows: list[WindowReport]) -> DayReport:
        came = sum(len(line.met) for line in self._lines.values())
        met = sum(int(line.met.sum()) for line in self._lines.values())
        return DayReport(
            dollars=machines.dollars,
            gpu_hours=machines.gpu_hours,
            attainment=met / came if came else 1.0,
            worst_hour=_worst_hour(list(self._lines.values()), self.end),
            switches=dict(machines.switches),
            requests=came,
            windows=windows,
        )


def _worst_hour(lines: Sequence[_Line], end: float) -> float:
    worst = 1.0
    for hour in range(max(1, int(end // 3600))):
        met = np.concatenate(
            [line.met[line.between(3600 * hour, 3600 * (hour + 1))] for line in lines]
        )
        if len(met):
            worst = min(worst, float(met.mean()))
    return worst


class _Line:
    """One model's requests and what has become of them so far."""

    def __init__(
        self, service: Service, built: Built, demand: Demand, requests: Sequence[Arrival]
    ) -> None:
        self._service, self._built, self._demand = service, built, demand
        self._requests = requests
        self._times = [request.at for request in requests]
        self._workers: dict[tuple[tuple[str, int], ...], list[WorkerSpec]] = {}
        self.begin()

    def begin(self) -> None:
        self.met: NDArray[np.bool_] = np.zeros(len(self._requests), dtype=bool)
        self._waiting: list[Arrival] = []

    def between(self, start: float, end: float) -> slice:
        return slice(bisect.bisect_left(self._times, start), bisect.bisect_left(self._times, end))

    def serve(self, span: Span, due: Mapping[str, Planned] | None) -> None:
        """Every request that comes within it is counted, under the workers of that time."""
        inside = self.between(span.start, span.end)
        workers = [
            msgspec.structs.replace(worker, plan=due.get(worker.kind) if due else None)
            for worker in self._workers_of(span.ready)
        ]
        came = self._requests[inside]
        if not workers:
            self._waiting += came
            return
        lead = self._requests[self.between(span.start - LEAD_S, span.start)]
        begin = max(0.0, span.start - LEAD_S)
        load = [request._replace(at=request.at - begin) for request in lead]
        load += [request._replace(at=span.start - begin) for request in self._waiting]
        ahead = len(load)
        load += [request._replace(at=request.at - begin) for request in came]
        if not load:
            return
        slo = self._demand.slo
        outcome = simulate_coarse(workers, load, slo=slo)
        self.met[inside] = outcome.met(slo.ttft_ms / 1e3, slo.tpot_ms / 1e3)[ahead:]
        late = ~outcome.refused & ~(outcome.first <= span.end - begin)
        late[: len(lead)] = False
        self._waiting = [
            load[number]._replace(at=span.end) for number in np.flatnonzero(late).tolist()
        ]

    def _workers_of(self, ready: Mapping[str, int]) -> list[WorkerSpec]:
        key = tuple(sorted(ready.items()))
        if key not in self._workers:
            found = plan_workers(self._service, self._built, PlanFile(dict(ready)))
            self._workers[key] = found[self._demand.name]
        return self._workers[key]

    def seen(self, start: float, end: float, met: NDArray[np.bool_] | None) -> Seen:
        inside = self.between(start, end)
        came = self._requests[inside]
        attained = float(met[inside].mean()) if met is not None and came else None
        return Seen(count_sizes(came, end - start), len(came), attained)
