"""One prompt's life, from the router's side: events in, instructions out.

An *attempt* puts some choices of the prompt on one route; it passes these phases,

    queued ── routed ──► prefilling ── first token ──► staged ── handed over ──► decoding
                              └────────── first token, on one worker ───────────────┘

and ends when all its choices have finished, or when a worker is lost or gives up: then each choice
that had begun is replayed by itself (prompt + emitted ids), those that had not begun together, in
new attempts. An attempt's epoch makes it unlike every other, so that words about an old one are
ignored. The KV cache has one owner at any time: the prefill worker until the decode worker speaks
or the hand-over is confirmed. Whoever may hold something is in the attempt's `workers`, and every
way out cancels it there; the lease that a decode worker gives ends by itself as well.

A *generation* is the prompt with all its attempts. It ends once: finished, refused or cancelled.
The *ledger* is what makes a replay possible: no token is given to the client twice and none is left
out, whoever computed it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from scheduler.errors import BadRequest, MotleyError, Unavailable
from scheduler.messages import Cancel, Failed, FailureKind, Output, Submit, Wire
from scheduler.request import Job, Prompt, TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.packed import PackedIds
    from scheduler.routing import Route

FRUITLESS = 8  # attempts in a row that give no token: something other than bad luck is at work
MOST_ATTEMPTS = 50  # of one choice, were each to give a token and then kill its worker


class Phase(enum.StrEnum):
    QUEUED = "queued"  # no route yet: nobody holds anything
    PREFILLING = "prefilling"  # at the decode worker room may be reserved
    STAGED = "staged"  # the first token is out, the KV cache on its way
    DECODING = "decoding"


class Outcome(enum.StrEnum):
    FINISHED = "finished"
    REFUSED = "refused"
    CANCELLED = "cancelled"


class Place(msgspec.Struct, frozen=True, gc=False):
    """Find a route for this job, then say `routed` or `unroutable`.

    Workers in `avoid` failed it before; `split` is False once a hand-over has failed.
    """

    job: Job
    avoid: frozenset[str]
    split: bool


class Send(msgspec.Struct, frozen=True, gc=False):
    worker: str
    message: Wire


class Started(msgspec.Struct, frozen=True, gc=False):
    """The prompt was accepted; said once, before any Deliver."""

    prompt_tokens: int


class Deliver(msgspec.Struct, frozen=True, gc=False):
    """Give this to the client; in order within a choice, each token once."""

    output: Output


class End(msgspec.Struct, frozen=True, gc=False):
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

    def take(self, output: Output) -> None:
        """The client gets this now."""
        self.emitted += output.ids
        self.sent += len(output.text)
        self.finished = output.finish is not None


@dataclass(slots=True)
class Attempt:
    choices: tuple[int, ...]
    number: int  # 1 for the first
    fruitless: int  # attempts in a row without a token for the client, this one included
    begin: int  # position of the first token that it gives
    phase: Phase = Phase.QUEUED
    prefill: str = ""
    decode: str = ""  # the same worker where the route is not split
    workers: set[str] = field(default_factory=set)  # who may hold something of it now

    @property
    def owner(self) -> str | None:
        """The worker that answers for the KV cache."""
        if self.phase is Phase.QUEUED:
            return None
        return self.decode if self.phase is Phase.DECODING else self.prefill

    def place(self, route: Route) -> None:
        self.phase, self.prefill = Phase.PREFILLING, route.worker
        self.decode = route.handoff.name if route.handoff else route.worker
        self.workers = {self.prefill, self.decode}

    def gave(self, position: int) -> None:
        """A token of this position came: only the decode worker gives any but the first."""
        if position > self.begin or self.prefill == self.decode:
            self.phase = Phase.DECODING
        elif self.phase is Phase.PREFILLING:
            self.phase = Phase.STAGED


class Generation:
    """The state machine of one prompt. Every method takes an event and gives instructions."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ledgers = {choice: Ledger() for choice in job.choices}
        self.attempts: dict[int, Attempt] = {}
        self.started = False
        self.outcome: Outcome | None = None
        self._epoch = job.epoch
        self._prompt_ids: TokenIds | PackedIds | None = None  # once a worker has said them
        self._avoid: set[str] = set()
        self._split = True

    @property
    def ended(self) -> bool:
        return self.outcome is not None

    def start(self) -> list[Instruction]:
        return [self._attempt(self.job.choices, number=1, fruitless=1)]

    def routed(self, epoch: int, route: Route) -> list[Instruction]:
        """The shell found a route for this attempt."""
        if epoch not in self.attempts:
            return []
        attempt = self.attempts[epoch]
        attempt.place(route)
        job = msgspec.structs.replace(self._job(epoch, attempt), turn=route.turn)
        return [Send(route.worker, Submit(job, route.handoff))]

    def unroutable(self, epoch: int, error: MotleyError) -> list[Instruction]:
        """The shell found none, and will not."""
        return self._end(Outcome.REFUSED, error) if epoch in self.attempts else []

    def accepted(self, epoch: int, prompt_ids: TokenIds | PackedIds) -> list[Instruction]:
        """A worker tokenised the prompt: from here on the ids are the prompt."""
        if epoch not in self.attempts or self.started:
            return []
        self.started = True
        self._prompt_ids = prompt_ids
        return [Started(len(prompt_ids))]

    def follows(self, output: Output) -> bool:
        """Nearly all outputs are what their choice waits for, and end nothing: taken, deliver it.

        False: it is for `output` to say what follows from it.
        """
        attempt = self.attempts.get(output.epoch)
        if attempt is None or attempt.phase is not Phase.DECODING or output.finish is not None:
            return False
        ledger = self.ledgers.get(output.choice)
        if ledger is None or ledger.early or output.position != len(ledger.emitted):
            return False
        if output.choice not in attempt.choices:
            return False
        ledger.take(output)
        return True

    def output(self, output: Output) -> list[Instruction]:
        """A worker gives tokens. The first one of a split request may come after the second."""
        attempt = self.attempts.get(output.epoch)
        if attempt is None or output.choice not in attempt.choices:
            return []
        ledger = self.ledgers[output.choice]
        if attempt.phase is not Phase.DECODING:
            attempt.gave(output.position)
        ledger.early[output.position] = output
        instructions: list[Instruction] = []
        while (due := ledger.early.pop(len(ledger.emitted), None)) is not None:
            ledger.take(due)
            instructions.append(Deliver(due))
        if not ledger.finished:
            return instructions
        if all(self.ledgers[choice].finished for choice in attempt.choices):
            del self.attempts[output.epoch]
            # The other end of the hand-over may not know yet, or never hear, that it is over.
            instructions += self._cancels(output.epoch, attempt.workers - {attempt.owner})
        if not self.attempts:
            instructions += self._end(Outcome.FINISHED)
        return instructions

    def handed_over(self, epoch: int, worker: str) -> list[Instruction]:
        """The prefill worker is done with it: its loss no longer matters."""
        if attempt := self.attempts.get(epoch):
            attempt.phase = Phase.DECODING
            if self._gave_way(attempt, worker):  # else its first tokens are still on their way
                attempt.workers.discard(worker)
        return []

    def failed(self, worker: str, failure: Failed) -> list[Instruction]:
        """A worker gave the job up."""
        attempt = self.attempts.get(failure.epoch)
        if attempt is None:
            return []
        attempt.workers.discard(worker)
        if self._gave_way(attempt, worker):
            return []
        if failure.kind is FailureKind.BAD_REQUEST:
            error = BadRequest(failure.message, param=failure.param, code=failure.code)
            return self._end(Outcome.REFUSED, error)
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
            if attempt := self.attempts.get(epoch):
                attempt.workers.discard(worker)
                if self._gave_way(attempt, worker):
                    continue
                self._avoid.add(worker)
                instructions += self._replay(epoch, f"worker {worker} was lost")
        return instructions

    def cancel(self) -> list[Instruction]:
        """The client left."""
        return [] if self.ended else self._end(Outcome.CANCELLED)

    def check_integrity(self) -> None:
        """Every unfinished choice is in exactly one attempt, until the end."""
        placed = sorted(c for attempt in self.attempts.values() for c in attempt.choices)
        assert len(set(placed)) == len(placed), "a choice is in two attempts"
        for choice, ledger in self.ledgers.items():
            assert self.ended or ledger.finished or choice in placed, f"choice {choice} is lost"
        assert not (self.ended and self.attempts), "an attempt outlives its generation"
        for attempt in self.attempts.values():
            assert attempt.owner is None or attempt.owner in attempt.workers, "nobody owns the KV"
            assert len(attempt.workers) <= 2, "more hold something than the route has workers"

    def _attempt(self, choices: tuple[int, ...], number: int, fruitless: int) -> Place:
        self._epoch += 1
        begin = len(self.ledgers[choices[0]].emitted)
        attempt = self.attempts[self._epoch] = Attempt(choices, number, fruitless, begin)
        return Place(self._job(self._epoch, attempt), frozenset(self._avoid), self._split)

    def _job(self, epoch: int, attempt: Attempt) -> Job:
        """The job as it stands: a choice that has begun carries what the client already has."""
        ledger = self.ledgers[attempt.choices[0]]
        ids = self._prompt_ids
        return msgspec.structs.replace(
            self.job,
            epoch=epoch,
            prompt=self.job.prompt if ids is None else Prompt(ids=list(ids)),
            choices=attempt.choices,
            emitted=list(ledger.emitted),
            sent=ledger.sent,
        )

    def _gave_way(self, attempt: Attempt, worker: str) -> bool:
        """The decode worker goes on, and the client has all that this prefill worker had to say."""
        if attempt.phase is not Phase.DECODING or worker == attempt.decode:
            return False
        ledgers = [self.ledgers[choice] for choice in attempt.choices]
        return all(len(ledger.emitted) > attempt.begin or ledger.finished for ledger in ledgers)

    def _replay(self, epoch: int, reason: str) -> list[Instruction]:
        """Give up one attempt and start what is unfinished of it elsewhere."""
        attempt = self.attempts.pop(epoch)
        instructions: list[Instruction] = list(self._cancels(epoch, attempt.workers))
        ledgers = [self.ledgers[choice] for choice in attempt.choices]
        gave = any(len(ledger.emitted) > attempt.begin for ledger in ledgers)
        if (attempt.fruitless == FRUITLESS and not gave) or attempt.number == MOST_ATTEMPTS:
            error = Unavailable(
                f"the request failed {attempt.number} times; the last time: {reason}"
            )
            return instructions + self._end(Outcome.REFUSED, error)
        unfinished = [c for c in attempt.choices if not self.ledgers[c].finished]
        for choice in unfinished:
            self.ledgers[choice].early.clear()
        fresh = tuple(c for c in unfinished if not self.ledgers[c].emitted)
        groups = [(c,) for c in unfinished if self.ledgers[c].emitted] + ([fresh] if fresh else [])
        number, fruitless = attempt.number + 1, 1 if gave else attempt.fruitless + 1
        return instructions + [self._attempt(group, number, fruitless) for group in groups]

    def _end(self, outcome: Outcome, error: MotleyError | None = None) -> list[Instruction]:
        """The one way out: whoever still holds something is told to free it."""
        self.outcome = outcome
        instructions: list[Instruction] = []
        for epoch, attempt in self.attempts.items():
            instructions += self._cancels(epoch, attempt.workers)
        self.attempts.clear()
        return [*instructions, End(error)]

    def _cancels(self, epoch: int, workers: Iterable[str]) -> list[Send]:
        return [Send(worker, Cancel(self.job.id, epoch)) for worker in sorted(workers)]
