"""From the workers that run to those that a plan wants, in stages that never leave a gap.

A stage's steps are carried out together, and the next stage begins when all of them are done: who
was started is ready, who was drained is empty. Within what the present load needs nothing is taken
away before its substitute is there. A worker whose role is flipped takes no machine, so flips come
first; one that would leave a gap for as long as it takes becomes a start and a stop instead. Only
where limits leave no room for a substitute, the least harmful step is taken anyway, and says so.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scheduler.problem import Column

State = Literal["starting", "ready", "draining"]
Action = Literal["flip", "start", "drain", "stop"]
SMALL = 1e-9


class Running(msgspec.Struct, frozen=True):
    """A worker that exists: as which column of the plan, in which state, `since` when in s."""

    name: str
    column: str
    state: State = "ready"
    since: float = 0.0


class Step(msgspec.Struct, frozen=True):
    """`flip`: from now on serve as `column`, after what it has under way. `start`: rent and start
    it. `drain`: give it nothing new. `stop`: once it is empty, stop and give back its machine.

    `short`: requests/s that are not served while the step lasts; 0 but where limits force it.
    """

    action: Action
    worker: str
    column: str
    short: float = 0.0


Stage = tuple[Step, ...]


class Load(Protocol):
    """What a set of replicas, by column, leaves unserved of the present load, in requests/s."""

    def __call__(self, replicas: Mapping[str, int]) -> float: ...


class Room(Protocol):
    """Whether such a set of machines may be rented at all."""

    def __call__(self, replicas: Mapping[str, int]) -> bool: ...


def switch(
    running: Sequence[Running],
    wanted: Mapping[str, int],
    columns: Mapping[str, Column],
    unserved: Load,
    room: Room,
) -> tuple[Stage, ...]:
    """Stages from `running` to exactly `wanted` replicas of each column; () if nothing changes."""
    return _Switch(running, wanted, columns, unserved, room).stages()


class _Switch:
    def __init__(
        self,
        running: Sequence[Running],
        wanted: Mapping[str, int],
        columns: Mapping[str, Column],
        unserved: Load,
        room: Room,
    ) -> None:
        self._unserved, self._room, self._columns = unserved, room, columns
        self._taken = {worker.name for worker in running}
        self._rented = Counter(worker.column for worker in running)
        self._ready = Counter(worker.column for worker in running if worker.state == "ready")
        self._drains, self._starts = _difference(running, wanted)
        self._flips = self._paired()
        # Stopped when they are empty, whatever else happens.
        self._leaving = [worker for worker in running if worker.state == "draining"]
        self._leaving += [worker for worker in self._drains if worker.state == "starting"]
        self._drains = [worker for worker in self._drains if worker.state == "ready"]
        flipped = {worker.name for worker, _ in self._flips}
        self._awaited = [
            worker
            for worker in running
            if worker.state == "starting"
            and worker not in self._leaving
            and worker.name not in flipped
        ]

    def _paired(self) -> list[tuple[Running, str]]:
        """A machine that one role has too many of becomes what another has too few of."""
        pairs = []
        for column in list(self._starts):
            for worker in self._drains:
                if self._columns[worker.column].machine == self._columns[column].machine:
                    pairs.append((worker, column))
                    self._drains.remove(worker)
                    self._starts.remove(column)
                    break
        return pairs

    def stages(self) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        while self._flips or self._starts:
            changes = self._safe_flips() + self._possible_starts() + self._awaits()
            stages.append(changes + self._substitutes() or self._forced())
        if self._drains and self._awaited:
            stages.append(self._awaits())
        stages.append(self._all_drains())
        stages.append(tuple(Step("stop", w.name, w.column) for w in self._leaving))
        return tuple(stage for stage in stages if stage)

    def _awaits(self) -> Stage:
        """Those who were on their way already are waited for before anything is taken away."""
        awaited, self._awaited = self._awaited, []
        self._ready += Counter(worker.column for worker in awaited)
        return tuple(Step("start", worker.name, worker.column) for worker in awaited)

    # ── one stage ───────────────────────────────────────────────────────────────────────────────

    def _safe_flips(self) -> Stage:
        steps, before, during = [], self._unserved(self._ready), Counter(self._ready)
        for worker, column in list(self._flips):
            if worker.state == "ready":
                during[worker.column] -= 1
                if self._unserved(during) > before + SMALL:
                    during[worker.column] += 1
                    continue
            self._flips.remove((worker, column))
            steps.append(self._flip(worker, column))
        return tuple(steps)

    def _substitutes(self) -> Stage:
        """Flips that will not be safe after this stage either: their substitutes start with it."""
        steps: list[Step] = []
        while (unsafe := self._unsafe()) and self._room(self._rented + Counter([unsafe[1]])):
            self._flips.remove(unsafe)
            self._drains.append(unsafe[0])
            steps.append(self._start(unsafe[1]))
        return tuple(steps)

    def _unsafe(self) -> tuple[Running, str] | None:
        before = self._unserved(self._ready)
        for worker, column in self._flips:
            lost = Counter([worker.column]) if worker.state == "ready" else Counter[str]()
            if self._unserved(self._ready - lost) > before + SMALL:
                return worker, column
        return None

    def _flip(self, worker: Running, column: str, short: float = 0.0) -> Step:
        self._rented[worker.column] -= 1
        self._ready[worker.column] -= worker.state == "ready"
        for counts in (self._ready, self._rented):
            counts[column] += 1
        return Step("flip", worker.name, column, short)

    def _possible_starts(self) -> Stage:
        steps = []
        for column in list(self._starts):
            if self._room(self._rented + Counter([column])):
                self._starts.remove(column)
                steps.append(self._start(column))
        return tuple(steps)

    def _start(self, column: str) -> Step:
        number = next(n for n in range(len(self._taken) + 1) if f"{column} #{n}" not in self._taken)
        name = f"{column} #{number}"
        self._taken.add(name)
        self._rented[column] += 1
        self._ready[column] += 1  # by the next stage
        return Step("start", name, column)

    def _all_drains(self) -> Stage:
        """All at once: what is wanted serves what it was planned for."""
        drains, self._drains = self._drains, []
        return tuple(self._drain(worker, 0.0) for worker in drains)

    def _drain(self, worker: Running, short: float) -> Step:
        self._ready[worker.column] -= 1
        self._leaving.append(worker)
        return Step("drain", worker.name, worker.column, short)

    def _forced(self) -> Stage:
        """No flip is safe, and no start has room: make some, with the least harm."""
        if self._leaving:
            steps = tuple(Step("stop", worker.name, worker.column) for worker in self._leaving)
            self._rented -= Counter(worker.column for worker in self._leaving)
            self._leaving = []
            return steps
        before = self._unserved(self._ready)
        harm: list[tuple[float, int]] = []
        candidates = [*self._drains, *(worker for worker, _ in self._flips)]
        assert candidates, "what is wanted is within the limits"
        for at, worker in enumerate(candidates):
            left = self._unserved(self._ready - Counter([worker.column]))
            harm.append((max(0.0, left - before), at))
        short, at = min(harm)
        worker = candidates[at]
        if worker in self._drains:
            self._drains.remove(worker)
            return (self._drain(worker, short),)
        column = next(column for flipped, column in self._flips if flipped is worker)
        self._flips.remove((worker, column))
        return (self._flip(worker, column, short),)


def _difference(
    running: Iterable[Running], wanted: Mapping[str, int]
) -> tuple[list[Running], list[str]]:
    """Who is too many, those first who are not ready or came last; and what is missing."""
    by_column: dict[str, list[Running]] = {}
    for worker in running:
        if worker.state != "draining":
            by_column.setdefault(worker.column, []).append(worker)
    surplus: list[Running] = []
    for column, workers in by_column.items():
        oldest_last = sorted(workers, key=lambda w: (w.state == "ready", -w.since, w.name))
        surplus += oldest_last[: max(0, len(workers) - wanted.get(column, 0))]
    missing = [
        column
        for column, count in wanted.items()
        for _ in range(count - len(by_column.get(column, ())))
    ]
    return surplus, missing
