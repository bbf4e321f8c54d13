"""The requests of a run: which prompt is due when. A function of the spec and its seed alone."""

from __future__ import annotations

import itertools
import random
from array import array
from typing import TYPE_CHECKING

import msgspec

from loadtest.api import Message
from loadtest.arrivals import Realised, realised, schedule
from loadtest.sizes import parse
from loadtest.text import Corpus
from loadtest.traces import Row, read, scaled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.spec import Spec


class Ask(msgspec.Struct):
    """One request to be sent `at` seconds after the run's start."""

    index: int
    at: float
    group: int
    input: int
    output: int
    session: int = -1
    turn: int = 0
    history: list[Message] = []


class Workload:
    """`first` yields what is due by the clock, `follow` what is due because an answer came."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._corpus = Corpus(spec.seed)
        self._system = self._corpus.words("system prompt", spec.shared_prefix)
        self._weights = [group.weight for group in spec.classes]
        self._sizes = [
            (
                parse(group.input, f"{group.name}: input") if group.input else spec.input,
                parse(group.output, f"{group.name}: output") if group.output else spec.output,
            )
            for group in spec.classes
        ]
        self._rows: list[Row] = []
        self._next: Iterator[int] = itertools.count()
        if spec.trace is not None:
            self._rows = self._replay(spec.trace)
        self.times = array("d", (row.at for row in self._rows)) or self._arrivals()

    @property
    def realised(self) -> Realised:
        return realised(self.times)

    @property
    def block_sharing(self) -> float:
        """The share of a trace's prompt blocks that an endless prefix cache would hold already."""
        seen: set[int] = set()
        total = hits = 0
        for row in self._rows:
            hits += sum(1 for block in row.blocks if block in seen)
            total += len(row.blocks)
            seen.update(row.blocks)
        return hits / total if total else 0.0

    def first(self, part: int = 0, parts: int = 1) -> Iterator[Ask]:
        """The asks of client process `part`, in order of their times."""
        spec = self._spec
        if spec.concurrency is not None:
            self._next = itertools.count(part, parts)
            for _ in range(part, spec.concurrency, parts):
                ask = self._from_pool(0.0)
                if ask is not None:
                    yield ask
            return
        for number in range(part, len(self.times), parts):
            yield self.arrival(number)

    def arrival(self, number: int) -> Ask:
        """The `number`-th of an open loop."""
        turns = self._spec.turns
        return self._ask(number * turns, self.times[number], number if turns > 1 else -1)

    def follow(self, ask: Ask, answer: str, ended: float) -> Ask | None:
        """What comes after the answer to `ask`, which ended at `ended`: a turn or a user's next."""
        due = ended + self._spec.think
        if self._spec.concurrency is not None:
            return self._from_pool(due)
        if ask.session < 0 or ask.turn + 1 >= self._spec.turns:
            return None
        later = self._ask(ask.index + 1, due, ask.session)
        later.turn = ask.turn + 1
        later.group = ask.group
        later.history = [*self.messages(ask), {"role": "assistant", "content": answer}]
        return later

    def messages(self, ask: Ask) -> list[Message]:
        if self._rows:
            row = self._rows[ask.index]
            if row.blocks:
                text = self._corpus.blocks(row.blocks, row.block_tokens, ask.input)
                return [{"role": "user", "content": text}]
        text = self._corpus.words(f"request {ask.index}", ask.input)
        if ask.history:
            return [*ask.history, {"role": "user", "content": text}]
        if self._system:
            text = f"{self._system} {text}"
        return [{"role": "user", "content": text}]

    def _ask(self, index: int, at: float, session: int = -1) -> Ask:
        rng = random.Random(f"{self._spec.seed}:request {index}")
        group = rng.choices(range(len(self._weights)), self._weights)[0] if self._weights[1:] else 0
        if self._rows:
            row = self._rows[index]
            return Ask(index, at, group, row.input, row.output, session)
        sizes = self._sizes[group]
        return Ask(index, at, group, sizes[0].draw(rng), sizes[1].draw(rng), session)

    def _from_pool(self, at: float) -> Ask | None:
        """A closed loop's next request, unless it has sent or lasted enough."""
        spec = self._spec
        index = next(self._next)
        if spec.requests is not None and index >= spec.requests:
            return None
        if spec.duration is not None and at >= spec.duration:
            return None
        return self._ask(index, at)

    def _replay(self, trace: str) -> list[Row]:
        spec = self._spec
        rows = scaled(read(trace), spec.scaling, random.Random(f"{spec.seed}:trace"))
        if spec.duration is not None:
            rows = [row for row in rows if row.at < spec.duration]
        return rows[: spec.requests]

    def _arrivals(self) -> array[float]:
        spec = self._spec
        if spec.closed or spec.trace is not None:
            return array("d")
        rng = random.Random(f"{spec.seed}:arrivals")
        count = None if spec.requests is None else -(-spec.requests // spec.turns)
        return schedule(spec.arrivals, rng, count=count, duration=spec.duration)
