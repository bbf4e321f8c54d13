"""The simulator's fast form: workers in closed form (`Lane`), and routes at the same prices.

An event is an arrival, a prompt that is computed, or an answer that ends. Above SHORTLIST workers
a sample is priced, as live.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from scheduler.fleet import SAMPLE, SHORTLIST
from scheduler.predict import STEPS_TO_GRANT, TAIL
from scheduler.simulate_lane import Lane, Prompt
from scheduler.simulate_market import Market
from scheduler.simulate_spec import Outcome, Timing, check_requests, check_workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.capacity import Slo
    from scheduler.simulate_book import Book
    from scheduler.simulate_lane import Said
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival


def simulate_coarse(
    workers: Sequence[WorkerSpec],
    requests: Sequence[Arrival],
    timing: Timing | None = None,
    slo: Slo | None = None,
) -> Outcome:
    """As `simulate`, six times as fast, with attainment within about two points of it.

    That is so where most requests are in time; beyond, both say that they are not, by other
    numbers. Prefixes and the ITL bound are not looked at. Raises SetupError naming what cannot be
    simulated.
    """
    check_workers(workers)
    check_requests(requests)
    return _Coarse(workers, requests, timing or Timing(), slo).run()


class _Coarse:
    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        requests: Sequence[Arrival],
        timing: Timing,
        slo: Slo | None,
    ) -> None:
        self._workers = workers
        self._requests = requests
        self._timing = timing
        self._lanes = [Lane(spec) for spec in workers]
        self._market = Market(workers, self._lanes, slo, overlap=timing.overlap)
        self._pools = _pools(self._market.books)
        self._draws = np.random.default_rng(0)
        # Heap: when a lane wants to be advanced; numbers beyond the lanes' are of requests whose
        # blocks are reserved, so that their prompts may be computed.
        self._due: list[tuple[float, int]] = []
        self._waiting: list[deque[int]] = [deque() for _ in workers]  # for blocks, by worker
        count = len(requests)
        self._first = [math.nan] * count
        self._last = [math.nan] * count
        self._refused = [False] * count
        self._prefills, self._decodes = [-1] * count, [-1] * count
        self._sending = [0.0] * len(workers)
        self._receiving = [0.0] * len(workers)
        self._transferred = 0.0
        self._events = 0

    def run(self) -> Outcome:
        delay = self._timing.network_s + self._timing.tokenise_s
        for number, request in enumerate(self._requests):
            now = request.at + delay
            self._until(now)
            self._place(number, request, now)
        self._until(math.inf)
        network = self._timing.network_s
        return Outcome(
            at=np.array([request.at for request in self._requests]),
            first=np.array(self._first) + network,
            last=np.array(self._last) + network,
            outputs=np.array([request.output for request in self._requests]),
            refused=np.array(self._refused),
            prefilled=np.array(self._prefills, dtype=np.int32),
            decoded=np.array(self._decodes, dtype=np.int32),
            busy=np.array([lane.busy for lane in self._lanes]),
            events=self._events,
            transferred=self._transferred,
        )

    def _until(self, now: float) -> None:
        """Everything that is over by then, in its order."""
        due, lanes = self._due, self._lanes
        while due and due[0][0] <= now:
            then, at = heapq.heappop(due)
            self._events += 1
            if at >= len(lanes):
                number = at - len(lanes)
                prompt = Prompt(number, self._requests[number].input, 1)
                self._market.books[self._prefills[number]].coming -= prompt.tokens
                self._add(prompt, self._prefills[number], then)
            elif lanes[at].due <= then:
                self._hear(lanes[at].advance(then), at)
                self._ask(at)

    def _ask(self, at: int) -> None:
        lane = self._lanes[at]
        if lane.due < math.inf:
            heapq.heappush(self._due, (lane.due, at))

    def _place(self, number: int, request: Arrival, now: float) -> None:
        self._events += 1
        route = self._market.place(number, request, now, self._some())
        if route is None:
            self._refused[number] = True
            return
        prefill, decode = route
        if request.input + request.output > self._workers[decode].kv_tokens:
            self._refused[number] = True
            self._market.first(number, now)
            self._market.last(number, request)
            return
        self._prefills[number], self._decodes[number] = prefill, decode
        if prefill == decode or request.output == 1:
            self._add(Prompt(number, request.input, request.output), prefill, now)
            return
        self._market.books[prefill].coming += request.input
        if self._waiting[decode] or not self._lanes[decode].reserve(request.input):
            self._waiting[decode].append(number)
        else:
            self._granted(number, now)

    def _add(self, prompt: Prompt, at: int, now: float) -> None:
        self._hear(self._lanes[at].add(prompt, now), at)
        self._ask(at)

    def _granted(self, number: int, now: float) -> None:
        """The decode worker says so after the step that it would plan next."""
        lane, words = self._lanes[self._decodes[number]], 2 * self._timing.network_s
        steps = STEPS_TO_GRANT * lane.step_s
        heapq.heappush(self._due, (now + words + steps, len(self._lanes) + number))

    def _some(self) -> Sequence[Book]:
        if len(self._lanes) <= SHORTLIST:
            return self._market.books
        each = max(2, SAMPLE // len(self._pools))
        drawn = self._draws.random(each * len(self._pools)).tolist()
        return [
            pool[int(drawn[number * each + one] * len(pool))]
            for number, pool in enumerate(self._pools)
            for one in range(each)
        ]

    def _hear(self, said: list[Said], at: int) -> None:
        for request, then, first, last in said:
            if first:
                self._first[request] = then
                self._market.first(request, then)
                if last and self._requests[request].output > 1:
                    self._hand_over(request, at, then)
                    continue
            if last:
                self._last[request] = then
                self._market.last(request, self._requests[request])
                self._release(at, then)

    def _release(self, at: int, now: float) -> None:
        """Blocks are free: whose turn is it?"""
        lane, waiting = self._lanes[at], self._waiting[at]
        while waiting and lane.reserve(self._requests[waiting[0]].input):
            self._granted(waiting.popleft(), now)

    def _hand_over(self, number: int, prefill: int, now: float) -> None:
        """The KV cache takes its time on both links; then the decode worker goes on."""
        request, decode = self._requests[number], self._decodes[number]
        sender, receiver = self._workers[prefill].cost, self._workers[decode].cost
        size = request.input * sender.kv_token_bytes
        ready = now - sender.prefill_s(request.input) if self._timing.overlap else now
        sent = max(ready, self._sending[prefill]) + size / sender.link_bytes_s
        taken = max(ready, self._receiving[decode]) + size / receiver.link_bytes_s
        self._sending[prefill], self._receiving[decode] = sent, taken
        self._transferred += size
        end = max(sent, taken, now + TAIL * size / min(sender.link_bytes_s, receiver.link_bytes_s))
        arrived = end + self._timing.network_s
        self._lanes[decode].arrive(number, request.input, request.output, arrived)
        self._ask(decode)


def _pools(books: Sequence[Book]) -> list[list[Book]]:
    """By role and speed, as `fleet.Fleet` samples."""
    pools: dict[tuple[str, int], list[Book]] = {}
    for book in books:
        key = book.spec.role, round(math.log2(max(book.kind.token_s, 1e-12)))
        pools.setdefault(key, []).append(book)
    return list(pools.values())
