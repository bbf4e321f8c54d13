"""Machines on simulated time: what becomes of the steps that an autoscaler asks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from scheduler.switching import Running, Stage, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scheduler.problem import Column
    from scheduler.service_file import Autoscaling
    from scheduler.switching import Step


class Span(NamedTuple):
    """From `start` to `end` in s these replicas, by column, were ready."""

    start: float
    end: float
    ready: dict[str, int]


@dataclass(slots=True)
class _Machine:
    column: str
    state: State
    since: float
    until: float = 0.0  # when it is ready, or empty


class Machines:
    """Carries stages out, one after the other, and keeps the bill from renting to giving back."""

    def __init__(
        self, settings: Autoscaling, columns: Mapping[str, Column], replicas: Mapping[str, int]
    ) -> None:
        self._settings, self._columns = settings, columns
        self._machines = {
            f"{column} #{number}": _Machine(column, "ready", 0.0)
            for column, count in replicas.items()
            for number in range(count)
        }
        self._now = 0.0
        self._stage: Stage = ()
        self._next: list[Stage] = []
        self.switches: Counter[str] = Counter()  # by action
        self.dollars = 0.0
        self.gpu_hours = 0.0

    @property
    def running(self) -> list[Running]:
        return [Running(name, m.column, m.state, m.since) for name, m in self._machines.items()]

    @property
    def ready(self) -> dict[str, int]:
        return dict(Counter(m.column for m in self._machines.values() if m.state == "ready"))

    def carry_out(self, stages: tuple[Stage, ...]) -> None:
        """Instead of whatever was still to be done; what has begun goes on."""
        self._next = list(stages)
        self._stage = ()
        self._proceed()

    def advance(self, until: float) -> list[Span]:
        """Time passes: what was ready when."""
        spans: list[Span] = []
        while self._now < until:
            then = min([until, *(m.until for m in self._machines.values() if m.until > self._now)])
            ready = self.ready
            if spans and spans[-1].ready == ready:
                spans[-1] = spans[-1]._replace(end=then)
            else:
                spans.append(Span(self._now, then, ready))
            hours = (then - self._now) / 3600
            for machine in self._machines.values():
                column = self._columns[machine.column]
                self.dollars += hours * column.price
                self.gpu_hours += hours * column.gpus
            self._now = then
            self._proceed()
        return spans

    def _proceed(self) -> None:
        """Who is ready by now, and the next stage where the last one is done."""
        while True:
            for machine in self._machines.values():
                if machine.state == "starting" and machine.until <= self._now:
                    machine.state, machine.since = "ready", self._now
            for step in self._stage:
                self._stop_if_empty(step)
            if not all(map(self._done, self._stage)) or not self._next:
                return
            self._stage = self._next.pop(0)
            for step in self._stage:
                self._begin(step)

    def _done(self, step: Step) -> bool:
        machine = self._machines.get(step.worker)
        if step.action == "stop":
            return machine is None
        return machine is None or machine.until <= self._now

    def _begin(self, step: Step) -> None:
        machine, settings = self._machines.get(step.worker), self._settings
        if step.action == "start" and machine is None:
            ready = self._now + settings.start_s
            self._machines[step.worker] = _Machine(step.column, "starting", self._now, ready)
            self.switches["start"] += 1
        elif step.action == "flip" and machine:
            machine.column, machine.state = step.column, "starting"
            machine.until = max(machine.until, self._now) + settings.flip_s
            self.switches["flip"] += 1
        elif step.action == "drain" and machine:
            machine.state, machine.until = "draining", self._now + settings.drain_s

    def _stop_if_empty(self, step: Step) -> None:
        machine = self._machines.get(step.worker)
        if step.action != "stop" or machine is None:
            return
        if machine.state == "starting" or machine.until <= self._now:
            del self._machines[step.worker]
            self.switches["stop"] += 1


def whole_time(spans: list[Span]) -> dict[str, int]:
    """The replicas of each column that were ready all the time."""
    columns = set.intersection(*(set(span.ready) for span in spans))
    return {column: min(span.ready[column] for span in spans) for column in sorted(columns)}
