"""One prompt's life, from the router's side: events in, instructions out.

    placing ──routed──► placed ──accepted, outputs──► every choice finished
       ▲                  │
       └── worker lost, hand-over failed, worker's own error ──┘

A *generation* is one prompt with its choices. An *attempt* puts some of its choices on one route;
its epoch makes it unlike every other attempt, so that words about an old one are ignored. When an
attempt breaks, each choice that had begun is replayed by itself (prompt + emitted ids), those that
had not begun stay together. The *ledger* is what makes a replay possible: no token is given to
the client twice and none is left out, whoever computed it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from scheduler.errors import BadRequest, MotleyError, Unavailable
from scheduler.messages import Cancel, Failed, FailureKind, Output, Submit, Wire
from scheduler.request import Job, Prompt, TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.routing import Route

MAX_ATTEMPTS = 5  # of one choice; after that something other than bad luck is at work


@dataclass(frozen=True, slots=True)
class Place:
    """Find a route for this job, then say `routed` or `unroutable`.

    Workers in `avoid` failed it before; `split` is False once a hand-over has failed.
    """

    job: Job
    avoid: frozenset[str]
    split: bool


@dataclass(frozen=True, slots=True)
class Send:
    worker: str
    message: Wire


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was accepted; said once, before any Deliver."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give this to the client; in order within a choice, each token once."""

    output: Output


@dataclass(frozen=True, slots=True)
class End:
    """Nothing follows. `error` is None when every choice finished or the client left."""

    error: MotleyError | None = None


Instruction: TypeAlias = Place | Send | Started | Deliver | End


@dataclass(slots=True)
class Ledger:
    """What the client has of one choice."""

    emitted: TokenIds = field(default_factory=list)
    sent: int = 0  # characters
    finished: bool = False
    early: dict[int, Output] = field(default_factory=dict)  # by position: came before its turn


@dataclass(slots=True)
class Attempt:
    choices: tuple[int, ...]
    number: int  # 1 for the first
    workers: set[str] = field(default_factory=set)  # who hold something of it now


class Generation:
    """The state machine of one prompt. Every method takes an event and gives instructions."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ledgers = {choice: Ledger() for choice in job.choices}
        self.attempts: dict[int, Attempt] = {}
        self.started = False
        self.ended = False
        self._epoch = job.epoch
        self._avoid: set[str] = set()
        self._split = True

    def start(self) -> list[Instruction]:
        return [self._attempt(self.job.choices, number=1)]

    def routed(self, epoch: int, route: Route) -> list[Instruction]:
        """The shell found a route for this attempt."""
        if epoch not in self.attempts:
            return []
        attempt = self.attempts[epoch]
        attempt.workers = {route.worker} | ({route.handoff.name} if route.handoff else set())
        return [Send(route.worker, Submit(self._job(epoch, attempt), route.handoff))]

    def unroutable(self, epoch: int, error: MotleyError) -> list[Instruction]:
        """The shell found none, and will not."""
        return self._end(error) if epoch in self.attempts else []

    def accepted(self, epoch: int, prompt_ids: TokenIds) -> list[Instruction]:
        """A worker tokenised the prompt: from here on the ids are the prompt."""
        if epoch not in self.attempts or self.started:
            return []
        self.started = True
        self.job = msgspec.structs.replace(self.job, prompt=Prompt(ids=prompt_ids))
        return [Started(len(prompt_ids))]

    def output(self, output: Output) -> list[Instruction]:
        """A worker gives tokens. The first one of a split request may come after the second."""
        attempt = self.attempts.get(output.epoch)
        if attempt is None or output.choice not in attempt.choices:
            return []
        ledger = self.ledgers[output.choice]
        ledger.early[output.position] = output
        instructions: list[Instruction] = []
        while (due := ledger.early.pop(len(ledger.emitted), None)) is not None:
            ledger.emitted += due.ids
            ledger.sent += len(due.text)
            ledger.finished = due.finish is not None
            instructions.append(Deliver(due))
        if all(self.ledgers[choice].finished for choice in attempt.choices):
            del self.attempts[output.epoch]
        if not self.attempts:
            instructions += self._end(None)
        return instructions

    def handed_over(self, epoch: int, worker: str) -> list[Instruction]:
        """The prefill worker is done with it: its loss no longer matters."""
        if epoch in self.attempts:
            self.attempts[epoch].workers.discard(worker)
        return []

    def failed(self, worker: str, failure: Failed) -> list[Instruction]:
        """A worker gave the job up."""
        attempt = self.attempts.get(failure.epoch)
        if attempt is None:
            return []
        attempt.workers.discard(worker)
        if failure.kind is FailureKind.BAD_REQUEST:
            error = BadRequest(failure.message, param=failure.param, code=failure.code)
            return self._end(error)
        if failure.kind is FailureKind.HANDOFF:
            self._split = False
        else:
            self._avoid.add(worker)
        return self._replay(failure.epoch, failure.message)

    def worker_lost(self, worker: str) -> list[Instruction]:
        """The connection to a worker ended."""
        epochs = [e for e, attempt in self.attempts.items() if worker in attempt.workers]
        instructions: list[Instruction] = []
        for epoch in epochs:
            if epoch in self.attempts:
                self.attempts[epoch].workers.discard(worker)
                self._avoid.add(worker)
                instructions += self._replay(epoch, f"worker {worker} was lost")
        return instructions

    def cancel(self) -> list[Instruction]:
        """The client left."""
        return [] if self.ended else self._end(None)

    def check_integrity(self) -> None:
        """Every unfinished choice is in exactly one attempt, until the end."""
        placed = sorted(c for attempt in self.attempts.values() for c in attempt.choices)
        assert len(set(placed)) == len(placed), "a choice is in two attempts"
        for choice, ledger in self.ledgers.items():
            assert self.ended or ledger.finished or choice in placed, f"choice {choice} is lost"
        assert not (self.ended and self.attempts), "an attempt outlives its generation"

    def _attempt(self, choices: tuple[int, ...], number: int) -> Place:
        self._epoch += 1
        attempt = self.attempts[self._epoch] = Attempt(choices, number)
        return Place(self._job(self._epoch, attempt), frozenset(self._avoid), self._split)

    def _job(self, epoch: int, attempt: Attempt) -> Job:
        """The job as it stands: a choice that has begun carries what the client already has."""
        ledger = self.ledgers[attempt.choices[0]]
        return msgspec.structs.replace(
            self.job,
            epoch=epoch,
            choices=attempt.choices,
            emitted=list(ledger.emitted),
            sent=ledger.sent,
        )

    def _replay(self, epoch: int, reason: str) -> list[Instruction]:
        """Give up one attempt and start what is unfinished of it elsewhere."""
        attempt = self.attempts.pop(epoch)
        instructions: list[Instruction] = list(self._cancels(epoch, attempt.workers))
        if attempt.number == MAX_ATTEMPTS:
            error = Unavailable(f"the request failed {MAX_ATTEMPTS} times; the last time: {reason}")
            return instructions + self._end(error)
        unfinished = [c for c in attempt.choices if not self.ledgers[c].finished]
        for choice in unfinished:
            self.ledgers[choice].early.clear()
        fresh = tuple(c for c in unfinished if not self.ledgers[c].emitted)
        groups = [(c,) for c in unfinished if self.ledgers[c].emitted] + ([fresh] if fresh else [])
        return instructions + [self._attempt(group, attempt.number + 1) for group in groups]

    def _end(self, error: MotleyError | None) -> list[Instruction]:
        """The one way out: whoever still holds something is told to free it."""
        self.ended = True
        instructions: list[Instruction] = []
        for epoch, attempt in self.attempts.items():
            instructions += self._cancels(epoch, attempt.workers)
        self.attempts.clear()
        return [*instructions, End(error)]

    def _cancels(self, epoch: int, workers: Iterable[str]) -> list[Send]:
        return [Send(worker, Cancel(self.job.id, epoch)) for worker in sorted(workers)]
