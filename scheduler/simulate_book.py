"""What the fast simulation knows of workers and requests: fewer records than routing's own.

What changes only with a worker's batch is kept beside it; what workers of one kind have in common
is reckoned once a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler import predict
from scheduler.forecast import SHORT
from scheduler.messages import Role
from scheduler.predict import SAFETY
from scheduler.shares import Allowance, rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.simulate_lane import Lane
    from scheduler.simulate_spec import WorkerSpec


@dataclass(slots=True)
class Request:
    """One that wants a route: see `pricing.Pricer`."""

    tokens: int
    attended: int  # the sum of their contexts
    each: float  # tokens after the first, expected
    length: float  # tokens, half of the expected output included
    need: float  # tokens of KV cache in the end
    now: float


@dataclass(slots=True)
class Kind:
    """Workers that are alike, and what the newest request would cost on any of them."""

    spec: WorkerSpec
    token_s: float  # of a prompt, in a full step
    allowance: Allowance | None  # by the plan
    price: float = 0.0  # of a second
    request: Request | None = None
    attention: float = 0.0
    stall: float = 0.0
    prompt_cost: float = 0.0
    own: float = 0.0  # seconds by which it makes a step longer
    output_cost: float = 0.0
    cost: int = 0  # of both together, rounded

    def ask(self, request: Request) -> None:
        self.request = request
        cost = self.spec.cost
        self.attention = cost.attend * request.attended
        self.stall = cost.token * request.tokens + self.attention
        self.own = cost.sequence + cost.context * request.length
        if self.allowance:
            self.price = price = self.allowance.price(request.tokens, request.now)
            self.prompt_cost = price * (request.tokens * self.token_s + self.attention)
            self.output_cost = price * request.each * self.own
            self.cost = rounded(self.prompt_cost + self.output_cost)

    def possible(self, request: Request, ttft: float, tpot: float) -> bool:
        """Whether it would keep these limits if it were idle: see `Pricer.possible`."""
        alone = request.tokens * self.token_s + self.attention
        step = self.spec.cost.decode_step_s(1, request.length)
        decodes = self.spec.role is not Role.PREFILL
        return decodes and alone <= SAFETY * ttft and step <= SAFETY * tpot


@dataclass(slots=True)
class Book:
    """A worker with what it was given and has not ended; see `fleet.Worker` for the words."""

    at: int
    lane: Lane
    spec: WorkerSpec
    kind: Kind
    takes: bool  # prompts for others
    gives: bool  # decodes
    coming: int = 0  # prompt tokens that wait for blocks where they will be decoded
    running: int = 0
    decoding: int = 0
    outputs: float = 0.0  # tokens that these will give
    context: float = 0.0
    held: float = 0.0
    mixed: float = 0.0
    mixed_at: float = 0.0
    # Of those that have begun: how many, the tokens that they will give, and the sum of the times
    # when they began; a heap of the steps by which each comes to something that is told; and
    # those that are not expected to have ended yet: how many, and the sum of the steps when they
    # are.
    begun: int = 0
    given: float = 0.0
    started: float = 0.0
    told: list[tuple[float, int]] = field(default_factory=list)
    expected: int = 0
    ends_sum: float = 0.0
    over: int = 0  # that were expected to have ended, and the sum of the steps when
    over_sum: float = 0.0
    # Follows from the batch: seconds of a step, and of a prompt token beside it.
    step_s: float = 0.0
    token_s: float = 0.0
    # What the newest request would find here.
    wait: float = 0.0
    ttft: float = 0.0
    share: float = 0.0  # of the time that goes to prompts
    tpot: float = 0.0
    room: float = 0.0
    before: float = 0.0  # seconds of the limits that those who run need without it
    used: float = 0.0  # and with its output: see `pricing.Decoded`
    limits: float = 0.0  # seconds that they allow in all

    def decodes(self, choices: int, tokens: float) -> None:
        """So many more whose prompt is computed, or will be before one that comes now."""
        self.decoding += choices
        self.outputs += choices * tokens

    def changed(self) -> None:
        """Its batch did."""
        spec = self.spec
        self.step_s = spec.cost.decode_step_s(self.running, self.context)
        self.token_s = predict.token_s(spec.cost, self.running, self.context, spec.max_step_tokens)


@dataclass(slots=True)
class Entry:
    """What a request has brought to its decode worker."""

    book: Book
    context: float
    held: float
    each: float  # tokens after the first, expected
    split: bool
    prompt: int
    began: float = 0.0
    step: float = 0.0  # when it began
    end: float = 0.0  # the step by which it is expected to end; negative once that is over
    tokens: int = 1  # that the forecast was told of
    size: int = 1 << SHORT  # of which it is told next

    def next(self) -> float:
        """The step by which it ends as expected, or comes to where the forecast counts it."""
        grown = self.step + self.size - 1
        return self.end if 0 < self.end < grown else grown


def books_of(workers: Sequence[WorkerSpec], lanes: Sequence[Lane]) -> list[Book]:
    """Of workers that have nothing to do."""
    kinds: dict[tuple[object, ...], Kind] = {}
    books = []
    for at, (spec, lane) in enumerate(zip(workers, lanes, strict=True)):
        alike = spec.role, spec.cost, spec.max_step_tokens, spec.plan and spec.kind
        if alike not in kinds:
            plan = Allowance(spec.plan) if spec.plan else None
            kinds[alike] = Kind(spec, predict.full_token_s(spec.cost, spec.max_step_tokens), plan)
        book = Book(
            at,
            lane,
            spec,
            kinds[alike],
            takes=spec.role is not Role.DECODE,
            gives=spec.role is not Role.PREFILL,
        )
        book.changed()
        books.append(book)
    return books
