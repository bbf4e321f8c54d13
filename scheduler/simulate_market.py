"""Routes for the fast simulation, at the prices of `scheduler.pricing` in few operations.

It knows each worker's queue as it is, and of hand-overs prices those from the soonest prefill.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scheduler.cost import context_sum
from scheduler.fleet import MIXING_S, MOST_MIXED
from scheduler.forecast import Forecast
from scheduler.messages import Role
from scheduler.pricing import HANDOVER_S, LINK_WORK, SAFETY, STALL, TAIL
from scheduler.routing import MAX_WAIT_S, PAIRED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.capacity import Slo
    from scheduler.simulate_lane import Lane
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival

# late, cost, wait, what others lose, TPOT and TTFT; without limits seconds in all
Price = tuple[float, ...]
NEVER: Price = (math.inf,)


@dataclass(slots=True)
class Book:
    """A worker with what it was given and has not ended; see `fleet.Worker` for the words."""

    at: int
    lane: Lane
    spec: WorkerSpec
    takes: bool  # prompts for others
    gives: bool  # decodes
    token_s: float
    coming: int = 0  # prompt tokens that wait for blocks where they will be decoded
    running: int = 0
    context: float = 0.0
    held: float = 0.0
    mixed: float = 0.0
    mixed_at: float = 0.0
    # Of those that have begun: how many, with the seconds that limits allow them, the sum of the
    # times when they began, and the tokens that they will give; and by which step each is expected
    # to end, as long as it is not over: a heap, how many, their sum.
    begun: int = 0
    allowed: float = 0.0
    started: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)
    outputs: float = 0.0
    expected: int = 0
    ends_sum: float = 0.0
    over: int = 0  # that were expected to have ended, and the sum of the steps when
    over_sum: float = 0.0


@dataclass(slots=True)
class Entry:
    """What a request has brought to its decode worker."""

    book: Book
    context: float
    held: float
    each: float  # tokens after the first, expected
    began: float = 0.0
    end: float = 0.0  # the step by which it is expected to end; negative once that is over


class _Ask(NamedTuple):
    """One request: its tokens, the sum of their contexts, what is expected of its output."""

    tokens: int
    attended: int
    each: float
    length: float
    need: float
    now: float


class _Sender(NamedTuple):
    ttft: float
    book: Book
    wait: float
    stall: float
    cost: float


class _Receiver(NamedTuple):
    tpot: float
    book: Book
    room: float
    cost: float
    slack: float


class Market:
    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        lanes: Sequence[Lane],
        slo: Slo | None,
        *,
        overlap: bool,
    ) -> None:
        self.books = [_book(at, *each) for at, each in enumerate(zip(workers, lanes, strict=True))]
        self._entries: dict[int, Entry] = {}
        self._forecast = Forecast()
        self._overlap = overlap
        self._limited = slo is not None
        self._ttft = slo.ttft_ms / 1e3 if slo else math.inf
        self._tpot = slo.tpot_ms / 1e3 if slo else math.inf

    def place(
        self, number: int, request: Arrival, now: float, books: Iterable[Book]
    ) -> tuple[int, int] | None:
        """Who computes the prompt and who decodes, of these workers; None: it is refused."""
        tokens = request.input
        output = min(self._forecast.output_tokens(tokens), request.output)
        ask = _Ask(
            tokens,
            context_sum(0, tokens),
            max(output - 1.0, 1.0),
            tokens + output / 2,
            tokens + output,
            now,
        )
        books = list(books)
        best, prefill, decode = NEVER, None, None
        shortest = math.inf
        sender: _Sender | None = None
        receivers: list[_Receiver] = []
        for book in books:
            sends, gets = self._ends(ask, book)
            if book.takes and (sender is None or sends.ttft < sender.ttft):
                sender = sends
            if gets is None:
                continue
            receivers.append(gets)
            price = self._whole(ask, sends, gets)
            shortest = min(shortest, max(sends.wait, gets.room))
            if price < best:
                best, prefill, decode = price, book, book
        assert decode, "somebody decodes"
        for gets in _best(receivers) if sender else ():
            if sender and sender.book is not gets.book:
                price = self._split(ask, sender, gets)
                shortest = min(shortest, max(sender.wait, gets.room))
                if price < best:
                    best, prefill, decode = price, sender.book, gets.book
        late = self._limited and (best[-1] > SAFETY * self._ttft or best[0] > 1 - SAFETY)
        if late and any(self._possible(ask, book) for book in books):
            return None
        if shortest > MAX_WAIT_S:
            return None
        assert prefill, "whoever decodes may also compute the prompt"
        self._enter(number, ask, prefill, decode)
        return prefill.at, decode.at

    def _possible(self, ask: _Ask, book: Book) -> bool:
        """Whether it would keep the limits if it were idle: see `Pricer.possible`."""
        cost = book.spec.cost
        ttft = ask.tokens * book.token_s + ask.attended * cost.attend
        tpot = cost.decode_step_s(1, ask.length)
        return book.gives and ttft <= SAFETY * self._ttft and tpot <= SAFETY * self._tpot

    def first(self, number: int, at: float) -> None:
        """Its first token is there."""
        entry = self._entries[number]
        book = entry.book
        lane = book.lane
        gone = max(0.0, at - lane.now) / lane.cost.decode_step_s(book.running, book.context)
        entry.began, entry.end = at, lane.step + gone + entry.each
        book.begun += 1
        book.outputs += entry.each
        book.allowed += self._tpot * entry.each
        book.started += at
        book.expected += 1
        book.ends_sum += entry.end
        heapq.heappush(book.ends, (entry.end, number))

    def last(self, number: int, request: Arrival) -> None:
        """All its tokens are."""
        entry = self._entries.pop(number)
        book = entry.book
        book.running -= 1
        book.context -= entry.context
        book.held -= entry.held
        book.begun -= 1
        book.outputs -= entry.each
        book.allowed -= self._tpot * entry.each
        book.started -= entry.began
        if entry.end > 0:
            book.expected -= 1
            book.ends_sum -= entry.end
        else:
            book.over -= 1
            book.over_sum += entry.end
        if request.output > 1:
            self._forecast.learn_output(request.input, request.output)

    def _left(self, book: Book, gone: float) -> float:
        """Tokens that those who have begun are expected to give yet, `gone` steps after `step`."""
        step = book.lane.step + gone
        while book.ends and book.ends[0][0] <= step:
            end, number = heapq.heappop(book.ends)
            entry = self._entries.get(number)
            if entry and entry.end > 0:
                entry.end = -end
                book.expected -= 1
                book.ends_sum -= end
                book.over += 1
                book.over_sum += end
        return max(0.0, book.ends_sum - step * book.expected)

    def _enter(self, number: int, ask: _Ask, prefill: Book, decode: Book) -> None:
        cost, now = prefill.lane.cost, ask.now
        share = cost.token * ask.tokens + cost.attend * ask.attended
        prefill.mixed = _mixed(prefill, now) + share / MIXING_S
        prefill.mixed_at = now
        decode.running += 1
        decode.context += ask.length
        decode.held += ask.need
        self._entries[number] = Entry(decode, ask.length, ask.need, ask.each)

    def _ends(self, ask: _Ask, book: Book) -> tuple[_Sender, _Receiver | None]:
        """The prompt there, and the output if the worker decodes."""
        cost, running = book.lane.cost, book.running
        chunk = book.spec.max_step_tokens
        step = cost.step + cost.sequence * running + cost.context * book.context
        per = cost.token + step / max(chunk - running, chunk // 4)
        attention = cost.attend * ask.attended
        lane, gone = book.lane, max(0.0, ask.now - book.lane.now)
        wait = (lane.queued + book.coming) * per
        if lane.queue:
            wait -= min(gone, wait / len(lane.queue))
        sender = _Sender(
            wait + ask.tokens * per + attention,
            book,
            wait,
            cost.token * ask.tokens + attention,
            book.spec.price * (ask.tokens * book.token_s + attention),
        )
        if not book.gives:
            return sender, None
        own = cost.sequence + cost.context * ask.length
        tpot = (step + own) / (1 - _mixed(book, ask.now))
        left = self._left(book, gone / step)
        room = 0.0
        if running and (book.held + ask.need > book.spec.kv_tokens or running >= _places(book)):
            over = (book.held + ask.need - book.spec.kv_tokens) / max(book.held, 1.0)
            crowd = (running + 1 - _places(book)) / running
            room = max(over, crowd, 0.0) * max(left, book.outputs / 2) / running * tpot
        slack = math.inf
        if self._limited and book.begun:
            spent = ask.now * book.begun - book.started + left * tpot
            more = self._tpot * (book.over * (lane.step + gone / step) - book.over_sum)
            slack = (book.allowed + more - spent) / book.begun
        return sender, _Receiver(tpot, book, room, book.spec.price * ask.each * own, slack)

    def _whole(self, ask: _Ask, sends: _Sender, gets: _Receiver) -> Price:
        ttft = sends.ttft + max(0.0, gets.room - sends.wait)
        if not self._limited:
            return (ttft + ask.each * gets.tpot + sends.stall * gets.book.running,)
        tpot = gets.tpot
        if not gets.book.takes:  # see Pricer.whole
            mixed = _mixed(gets.book, ask.now)
            tpot *= (1 - mixed) / (1 - min(MOST_MIXED, mixed + sends.stall / MIXING_S))
        late = self._late(ttft, tpot) + _harm(gets, sends.stall)
        wait, others = max(sends.wait, gets.room), sends.stall * gets.book.running
        return late, sends.cost + gets.cost, wait, others, tpot, ttft

    def _split(self, ask: _Ask, sends: _Sender, gets: _Receiver) -> Price:
        sender, receiver = sends.book.spec.cost, gets.book.spec.cost
        rate = min(sender.link_bytes_s, receiver.link_bytes_s)
        moving = exposed = ask.tokens * sender.kv_token_bytes / rate
        if self._overlap:
            exposed = max(exposed - (sends.ttft - sends.wait), TAIL * moving)
        ttft = sends.ttft + max(0.0, gets.room - sends.wait)
        tpot = gets.tpot + (HANDOVER_S + exposed) / ask.each
        if not self._limited:
            return (ttft + ask.each * tpot + sends.stall * sends.book.running,)
        late = self._late(ttft, tpot) + _harm(gets, 0.0)
        link = LINK_WORK * moving * (sends.book.spec.price + gets.book.spec.price)
        wait, others = max(sends.wait, gets.room), sends.stall * sends.book.running
        return late, sends.cost + gets.cost + link, wait, others, tpot, ttft

    def _late(self, ttft: float, tpot: float) -> float:
        late = ttft / self._ttft - SAFETY if ttft > SAFETY * self._ttft else 0.0
        return late + (tpot / self._tpot - SAFETY if tpot > SAFETY * self._tpot else 0.0)


def _best(receivers: list[_Receiver]) -> list[_Receiver]:
    """As `routing` does: of many, the fastest."""
    return receivers if len(receivers) <= PAIRED else sorted(receivers, key=_tpot)[:PAIRED]


def _harm(gets: _Receiver, stall: float) -> float:
    book, missing = gets.book, STALL * stall - gets.slack
    return missing * book.begun / book.allowed if missing > 0 and book.allowed else 0.0


def _tpot(receiver: _Receiver) -> float:
    return receiver.tpot


def _mixed(book: Book, now: float) -> float:
    return min(MOST_MIXED, book.mixed * math.exp((book.mixed_at - now) / MIXING_S))


def _places(book: Book) -> int:
    return book.spec.max_sequences


def _book(at: int, spec: WorkerSpec, lane: Lane) -> Book:
    return Book(
        at,
        lane,
        spec,
        takes=spec.role is not Role.DECODE,
        gives=spec.role is not Role.PREFILL,
        token_s=spec.cost.token + spec.cost.step / spec.max_step_tokens,
    )
