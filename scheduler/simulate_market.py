"""Routes for the fast simulation: the router's arithmetic (`scheduler.predict`) on fewer records.

It knows each worker's queue as it is, and of hand-overs prices those from the soonest
prefill, and from a mixed worker among many only that to the one which decodes fastest.
"""

from __future__ import annotations

import heapq
import math
from operator import attrgetter
from typing import TYPE_CHECKING

from scheduler import predict
from scheduler.cost import context_sum
from scheduler.forecast import Forecast
from scheduler.predict import LINK_WORK, MARGIN, MIXING_S, ROLE, SECOND, STEPS_TO_GRANT
from scheduler.routing import HOPELESS, IN_TIME, MAX_WAIT_S, PAIRED
from scheduler.shares import MOST, rounded
from scheduler.simulate_book import Entry, Request, books_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.capacity import Slo
    from scheduler.simulate_book import Book
    from scheduler.simulate_lane import Lane
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival

# whether it is risky, cost, toll, wait: in the order of routing's `_by_plan` or `_by_toll`
Price = tuple[float, ...]
NEVER: Price = (math.inf,)


class Market:
    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        lanes: Sequence[Lane],
        slo: Slo | None,
        *,
        overlap: bool,
    ) -> None:
        self.books = books_of(workers, lanes)
        self._entries: dict[int, Entry] = {}
        self._forecast = Forecast()
        self._overlap = overlap
        self._limited = slo is not None
        self._in_time = IN_TIME if slo else -1.0  # a toll for which a route is taken for its price
        self._ttft = slo.ttft_ms / 1e3 if slo else math.inf
        self._tpot = slo.tpot_ms / 1e3 if slo else math.inf

    def place(
        self, number: int, request: Arrival, now: float, books: Iterable[Book]
    ) -> tuple[int, int] | None:
        """Who computes the prompt and who decodes, of these workers; None: it is refused."""
        ask = self._request(request, now)
        best, prefill, decode = NEVER, None, None
        sender: Book | None = None
        receivers: list[Book] = []
        for book in books:
            if book.kind.request is not ask:
                book.kind.ask(ask)
            self._ask(book, ask)
            if book.takes and (sender is None or book.ttft < sender.ttft):
                sender = book
            if not book.gives:
                continue
            receivers.append(book)
            price = self._whole(book, ask)
            if price < best:
                best, prefill, decode = price, book, book
        assert decode, "somebody decodes"
        if sender:
            held_up = self._held_up(sender, ask, output=False, prompt=True)
            for book in _best(sender, receivers):
                if book is sender:
                    continue
                price = self._split(sender, book, ask, held_up)
                if price < best:
                    best, prefill, decode = price, sender, book
        if best[3] > MAX_WAIT_S or self._refused(best, receivers, ask):
            return None
        assert prefill, "whoever decodes may also compute the prompt"
        self._enter(number, ask, prefill, decode)
        return prefill.at, decode.at

    def first(self, number: int, at: float) -> None:
        """Its first token is there."""
        entry = self._entries[number]
        book = entry.book
        lane = book.lane
        gone = max(0.0, at - lane.now) / book.step_s
        entry.began, entry.step = at, lane.step + gone
        entry.end = entry.step + entry.each
        if entry.split:
            book.decodes(1, entry.each)
        book.begun += 1
        book.given += entry.each
        book.started += at
        book.expected += 1
        book.ends_sum += entry.end
        heapq.heappush(book.told, (entry.next(), number))

    def last(self, number: int, request: Arrival) -> None:
        """All its tokens are."""
        entry = self._entries.pop(number)
        book = entry.book
        book.running -= 1
        book.context -= entry.context
        book.held -= entry.held
        book.decodes(-1, entry.each)
        book.begun -= 1
        book.given -= entry.each
        book.started -= entry.began
        if entry.end > 0:
            book.expected -= 1
            book.ends_sum -= entry.end
        else:
            book.over -= 1
            book.over_sum += entry.end
        book.changed()
        if request.output > 1:
            self._forecast.learn_growth(request.input, entry.tokens, request.output)
            self._forecast.learn_end(request.input, request.output)

    def _request(self, request: Arrival, now: float) -> Request:
        tokens = request.input
        output = self._forecast.output_tokens(tokens)
        each = output - 1.0 if output > 2.0 else 1.0
        attended = context_sum(0, tokens)
        return Request(tokens, attended, each, tokens + output / 2, tokens + output, now)

    def _refused(self, best: Price, receivers: list[Book], ask: Request) -> bool:
        """Whether it would only be made late, and an idle worker could keep its limits."""
        late = self._limited and best[2] > HOPELESS
        return late and any(book.kind.possible(ask, self._ttft, self._tpot) for book in receivers)

    def _enter(self, number: int, ask: Request, prefill: Book, decode: Book) -> None:
        now = ask.now
        share = predict.mixed(prefill.mixed, now - prefill.mixed_at)
        prefill.mixed, prefill.mixed_at = share + prefill.kind.stall / MIXING_S, now
        for end in (prefill, decode):
            if end.kind.allowance:  # see Placer
                half = prefill is decode or (end.takes and end.gives)
                end.kind.allowance.take(ask.tokens, 0.5 if half else 1.0, now)
        split = prefill is not decode
        if not split:
            decode.decodes(1, ask.each)
        decode.running += 1
        decode.context += ask.length
        decode.held += ask.need
        decode.changed()
        self._entries[number] = Entry(decode, ask.length, ask.need, ask.each, split, ask.tokens)

    def _ask(self, book: Book, ask: Request) -> None:
        """The prompt there, and the output: TPOT, room, what those who run need of their limits."""
        lane, now, running, spec, step_s = book.lane, ask.now, book.running, book.spec, book.step_s
        wait = (lane.queued + book.coming) * book.token_s
        if lane.queue:
            wait = predict.queue_s(wait, len(lane.queue), now - lane.now)
        book.wait = wait
        book.ttft = wait + ask.tokens * book.token_s + book.kind.attention
        if not book.gives:
            return
        book.share = predict.mixed(book.mixed, now - book.mixed_at)
        busy = 1 - book.share
        book.tpot = tpot = (step_s + book.kind.own) / busy
        step = lane.step + (now - lane.now) / step_s if now > lane.now else lane.step
        if book.told and book.told[0][0] <= step:
            self._hear(book, step)
        left = book.ends_sum - step * book.expected
        if left < 0:
            left = 0.0
        book.room = 0.0
        held, places = book.held, spec.max_sequences
        if running and (running >= places or held + ask.need > spec.kv_tokens):
            crowding = predict.crowding(held, ask.need, spec.kv_tokens, running, 1, places)
            book.room = crowding * predict.turnover_s(left, book.outputs, book.decoding, tpot)
        if self._limited and book.decoding:
            gone = now * book.begun - book.started  # and what queued prompts take: see `Worker`
            if lane.queued:
                gone += lane.queued * spec.cost.token * (book.begun + book.decoding) / 2
            left += book.outputs - book.given
            book.before = gone + left * step_s / busy
            book.used = gone + left * tpot
            book.limits = self._tpot * (book.outputs + book.over * step - book.over_sum)

    def _hear(self, book: Book, step: float) -> None:
        """What answers have come to by this step: a size that is counted, or their expected end."""
        while book.told and book.told[0][0] <= step:
            at, number = book.told[0]
            entry = self._entries.get(number)
            if not entry:
                heapq.heappop(book.told)
                continue
            if at >= entry.end > 0:
                book.expected -= 1
                book.ends_sum -= entry.end
                book.over += 1
                book.over_sum += entry.end
                entry.end = -entry.end
            else:
                self._forecast.learn_growth(entry.prompt, entry.tokens, entry.size)
                entry.tokens, entry.size = entry.size, 2 * entry.size
            heapq.heapreplace(book.told, (entry.next(), number))

    def _whole(self, book: Book, ask: Request) -> Price:
        """As `Pricer.whole`."""
        kind, wait, ttft, tpot = book.kind, book.wait, book.ttft, book.tpot
        if book.room > wait:
            ttft, wait = ttft + book.room - wait, book.room
        if not book.takes:
            tpot *= predict.slowing(book.share, kind.stall)
        toll = self._own_toll(ttft, tpot, _behind(book, book.room))
        toll += self._held_up(book, ask, output=True, prompt=True)
        return (True, 0, toll, wait) if toll > self._in_time else (False, kind.cost, toll, wait)

    def _split(self, prefill: Book, decode: Book, ask: Request, held_up: float) -> Price:
        """As `Pricer.split`. `held_up`: the toll of those who run where the prompt is computed."""
        sender, receiver = prefill.spec, decode.spec
        rate = min(sender.cost.link_bytes_s, receiver.cost.link_bytes_s)
        moving = exposed = ask.tokens * sender.cost.kv_token_bytes / rate
        wait, ttft = prefill.wait, prefill.ttft
        if self._overlap:
            exposed = predict.hidden_s(exposed, moving, ttft - wait)
        if decode.room > wait:
            ttft, wait = ttft + decode.room - wait, decode.room
        step = decode.step_s if decode.running else 0.0
        queued = decode.lane.queued
        if queued:
            most = receiver.max_step_tokens
            step += receiver.cost.token * (queued if queued < most else most)
        tpot = predict.handed_tpot_s(decode.tpot, exposed, ask.each, step)
        toll = self._own_toll(ttft + STEPS_TO_GRANT * step, tpot, _behind(prefill, decode.room))
        toll += held_up + self._held_up(decode, ask, output=True, prompt=False)
        if sender.role is receiver.role:
            toll *= MARGIN
        cost = 0
        if prefill.kind.allowance or decode.kind.allowance:
            link = LINK_WORK * moving * (prefill.kind.price + decode.kind.price)
            dollars = prefill.kind.prompt_cost + decode.kind.output_cost + link
            cost = rounded(dollars * MOST if decode.takes or prefill.gives else dollars)
        return (True, 0, toll, wait) if toll > self._in_time else (False, cost, toll, wait)

    def _own_toll(self, ttft: float, tpot: float, behind: float) -> float:
        """As `Pricer.toll`."""
        weight = predict.weight(ttft, tpot, behind)
        if not self._limited:
            return weight
        limit = self._ttft
        first = predict.queued(ttft / limit, behind / limit)
        return first + predict.risk(tpot / self._tpot) + SECOND * weight

    def _held_up(self, book: Book, ask: Request, *, output: bool, prompt: bool) -> float:
        """The toll of those who run there, by this output beside them, its prompt, or both."""
        kind, toll, decoding = book.kind, 0.0, book.decoding
        if not self._limited:
            if output:
                toll += predict.slowed(book.running, kind.own / (1 - book.share))
            if prompt:
                weight = kind.stall if book.takes else ROLE * kind.stall
                toll += predict.held_up(decoding, book.outputs, weight)
            return toll
        if decoding:
            before, after = book.before if output else book.used, book.used
            if prompt:
                after += kind.stall * decoding
            toll += predict.made_late(decoding, before, after - before, book.limits)
        if prompt and book.running > decoding:
            toll += predict.met(ask.each, book.tpot, self._tpot, kind.stall)
        return toll


def _behind(book: Book, room: float) -> float:
    """Seconds that the prompt there keeps those waiting who will come behind it."""
    if not book.lane.queue:
        return room
    queue = len(book.lane.queue) * (book.ttft - book.wait)
    return room if room > queue else queue


def _best(sender: Book, receivers: list[Book]) -> list[Book]:
    """As `routing` does: of many, the fastest; just one where the sender decodes as well."""
    if len(receivers) <= PAIRED:
        return receivers
    if sender.gives:
        return [min(receivers, key=attrgetter("tpot"))]
    return sorted(receivers, key=attrgetter("tpot"))[:PAIRED]
