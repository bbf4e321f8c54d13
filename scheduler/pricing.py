"""What a route would cost, and whether it would be in time: predictions on its very workers.

TTFT = wait + uncached prompt tokens at that worker's rate           (prompt and queue)
       + the steps until blocks are reserved, where it is handed over
TPOT = a step with this request in it / share of time left by prompts
       + (KV cache on the link, as far as prefill does not hide it) / output tokens
cost = seconds that the request adds to each worker · the price of a second there
toll = with limits: how many requests the route is expected to make late, itself and those who
       decode where it goes; without: its own seconds and those that it takes from them
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler import predict
from scheduler.cost import context_sum
from scheduler.fleet import Rank, Worker
from scheduler.messages import Role
from scheduler.predict import LINK_WORK, MARGIN, ROLE, SAFETY, SECOND, STEPS_TO_GRANT
from scheduler.shares import MOST

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.shares import Allowance


class Demand(msgspec.Struct, frozen=True):
    """One prompt that wants a route. Seconds are those that are left when it is placed."""

    prompt_tokens: int
    output_tokens: float = 128.0  # predicted, of each choice
    choices: int = 1
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    rank: Rank = (0, 0)
    prefill_only: bool = False  # it ends with its prompt
    split: bool = True  # may be computed on one worker and decoded on another
    avoid: frozenset[str] = frozenset()  # workers that failed it before
    number: int = 0  # of the request, for policies that take turns
    cached: dict[Worker, int] = {}  # prompt tokens known to be there

    @property
    def limited(self) -> bool:
        return self.ttft_s < math.inf or self.tpot_s < math.inf

    def work(self, worker: Worker) -> tuple[int, int]:
        """Prompt tokens to compute there, and the sum of their contexts."""
        known = min(self.cached.get(worker, 0), self.prompt_tokens - 1) if self.cached else 0
        return self.prompt_tokens - known, context_sum(known, self.prompt_tokens)


class Decoded(NamedTuple):
    """The output on `worker`."""

    worker: Worker
    tpot: float
    room: float  # seconds until it can be taken in
    step: float  # seconds of the step that the worker is in
    used: float  # seconds that those who run with limits need in all, beside it
    toll: float  # of those who run
    cost: float


class Prompted(NamedTuple):
    """The prompt on `worker`."""

    worker: Worker
    ttft: float
    wait: float  # of it, what goes by before the prompt begins
    own: float  # of it, what the prompt itself takes
    behind: float  # seconds that it keeps those waiting, in all, who will come behind it
    stall: float  # how long it holds up those who decode there
    toll: float  # of these
    cost: float


class Price(NamedTuple):
    """Of one route."""

    toll: float
    cost: float
    ttft: float
    tpot: float
    wait: float  # of the TTFT, what goes by before the prompt begins
    prefill: Worker
    decode: Worker


class Pricer:
    """Prices routes of one request at one moment: first each worker by itself, then each pair."""

    def __init__(self, demand: Demand, now: float) -> None:
        self._demand = demand
        self._now = now
        output, choices = demand.output_tokens, demand.choices
        self._limited = demand.limited
        self._each = max(output - 1, 1.0)  # tokens of a choice after its first
        self._tokens = 0.0 if demand.prefill_only else self._each * choices
        self._length = demand.prompt_tokens + output / 2  # of a choice, on the mean
        self._need = demand.prompt_tokens + choices * output
        self._ttft, self._tpot = SAFETY * demand.ttft_s, SAFETY * demand.tpot_s
        self._prices: dict[Allowance, float] = {}  # by column

    def decoded(self, worker: Worker) -> Decoded:
        if not self._tokens:
            return Decoded(worker, 0.0, 0.0, worker.step_s, 0.0, 0.0, 0.0)
        choices, cost, now = self._demand.choices, worker.cost, self._now
        own = cost.sequence + cost.context * self._length
        more, alone, busy = choices * own, worker.decode_s, 1 - worker.mixed(now)
        tpot = (alone + more) / busy
        used = toll = 0.0
        if not self._limited:
            toll = predict.slowed(worker.running, more / busy)
        elif worker.limited:
            used = worker.needed_s(tpot, now)
            before = used - worker.limited_left * more / busy
            toll = predict.made_late(worker.limited, before, used - before, worker.allowed)
        room = worker.room_s(self._need, choices, tpot) + worker.stalled_s(now)
        cost_s = self._price(worker) * self._tokens * own
        return Decoded(worker, tpot, room, worker.step_s, used, toll, cost_s)

    def prompted(self, worker: Worker, output: Decoded | None) -> Prompted:
        """`output`: on the same worker, if it decodes."""
        tokens, attended = self._demand.work(worker)
        cost = worker.cost
        wait = worker.wait_s(self._demand.rank, self._now)
        attention = cost.attend * attended
        stall, toll = cost.token * tokens + attention, 0.0
        if output and not self._limited:
            weight = ROLE * stall if worker.role is Role.DECODE else stall
            toll = predict.held_up(worker.decoding, worker.outputs, weight)
        elif output and worker.limited:
            count = worker.limited
            toll = predict.made_late(count, output.used, stall * count, worker.allowed)
        if output and self._limited and worker.running > worker.decoding:
            toll += predict.met(self._each, output.tpot, self._demand.tpot_s, stall)
        price = self._price(worker) * (tokens * worker.token_s + attention)
        own = worker.prompt_s(tokens, attended)
        behind = own * sum([work.jobs for work in worker.queued.values()])
        return Prompted(worker, wait + own, wait, own, behind, stall, toll, price)

    # The queue of prompts goes by while there comes room: of the two waits the longer counts.

    def whole(self, prompt: Prompted, output: Decoded) -> Price:
        """Both on one worker, which holds up everybody there while it computes the prompt."""
        room = output.room - prompt.wait if output.room > prompt.wait else 0.0
        worker, cost, wait = prompt.worker, prompt.cost + output.cost, prompt.wait + room
        behind = output.room if output.room > prompt.behind else prompt.behind
        ttft, tpot = prompt.ttft + room, output.tpot
        if worker.role is Role.DECODE:
            # What slows it down are prompts like this one: without its own share, a decode worker
            # that computes prompts would never look faster to those that are computed elsewhere.
            tpot *= worker.slowing(prompt.stall, self._now)
        toll = self.toll(ttft, tpot, behind) + prompt.toll + output.toll
        return Price(toll, cost, ttft, tpot, wait, worker, worker)

    def split(self, prompt: Prompted, output: Decoded) -> Price:
        """On two: blocks on the decode worker are reserved before prefill begins."""
        prefill, decode = prompt.worker, output.worker
        size = self._demand.prompt_tokens * prefill.cost.kv_token_bytes
        rate = prefill.link_bytes_s(decode, self._now)
        moving = size / rate
        exposed = max(prefill.moving, decode.moving) / rate + moving
        if prefill.overlaps:
            exposed = predict.hidden_s(exposed, moving, prompt.own)
        room = output.room - prompt.wait if output.room > prompt.wait else 0.0
        wait = prompt.wait + room
        behind = output.room if output.room > prompt.behind else prompt.behind
        ttft = prompt.ttft + room + STEPS_TO_GRANT * output.step
        tpot = predict.handed_tpot_s(output.tpot, exposed, self._each, output.step)
        link = LINK_WORK * moving * (self._price(prefill) + self._price(decode))
        cost = prompt.cost + output.cost + link
        if Role.MIXED in (prefill.role, decode.role):
            cost *= MOST  # no plan has such a route
        toll = self.toll(ttft, tpot, behind) + prompt.toll + output.toll
        if prefill.role is decode.role:
            toll *= MARGIN
        return Price(toll, cost, ttft, tpot, wait, prefill, decode)

    def possible(self, workers: Iterable[Worker]) -> bool:
        """Whether one of these would keep the limits if it were idle."""
        demand = self._demand
        for worker in workers:
            cost, (tokens, attended) = worker.cost, demand.work(worker)
            ttft = tokens * worker.token_s + attended * cost.attend
            tpot = cost.decode_step_s(demand.choices, demand.choices * self._length)
            if ttft <= self._ttft and (tpot <= self._tpot or not self._tokens):
                return True
        return False

    def late_s(self, price: Price) -> float:
        """Seconds until this route would be in time: its queue falls, or one of its batch ends."""
        if price.ttft > self._ttft:
            return price.ttft - self._ttft
        return price.decode.turnover_s(price.tpot) / max(price.decode.decoding, 1)

    def toll(self, ttft: float, tpot: float, behind: float) -> float:
        """Its own part, and that of those who will wait behind it."""
        weight = predict.weight(ttft, tpot, behind)
        if not self._limited:
            return weight
        demand = self._demand
        first = predict.queued(ttft / demand.ttft_s, behind / demand.ttft_s)
        return first + predict.risk(tpot / demand.tpot_s) + SECOND * weight

    def _price(self, worker: Worker) -> float:
        """Of a second there; it is asked for only where there are limits."""
        allowance = worker.allowance
        if allowance is None or not self._demand.limited:
            return 0.0
        price = self._prices.get(allowance)
        if price is None:
            price = self._prices[allowance] = allowance.price(self._demand.prompt_tokens, self._now)
        return price
