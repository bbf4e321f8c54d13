"""The simulator's fast form: workers in closed form, and routes by the same prices.

One event is one arrival; between arrivals each worker is a `Lane`. Routes are priced as the live
router prices them (predicted time to the first token and per token on the very workers), but with
each worker's queue as it is, not as far as it was reported. Above SHORTLIST workers a sample is
priced, as live.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from scheduler.messages import Role
from scheduler.simulate import TAIL
from scheduler.simulate_lane import Lane, Prompt
from scheduler.simulate_router import LEARN, OUTPUT_TOKENS
from scheduler.simulate_spec import Outcome, Timing, check_requests, check_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.simulate_lane import Ended
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival

SHORTLIST = 32  # workers that are all priced; of more, a sample
SAMPLE = 8  # of the workers that take prompts, and of those that decode


def simulate_coarse(
    workers: Sequence[WorkerSpec],
    requests: Sequence[Arrival],
    timing: Timing | None = None,
    sample: Callable[[int], Sequence[int]] | None = None,
) -> Outcome:
    """As `simulate`, in a tenth of the time, and near it. `sample(n)` draws some of range(n)."""
    check_workers(workers)
    check_requests(requests)
    return _Coarse(workers, requests, timing or Timing(), sample).run()


class _Coarse:
    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        requests: Sequence[Arrival],
        timing: Timing,
        sample: Callable[[int], Sequence[int]] | None,
    ) -> None:
        self._workers = workers
        self._requests = requests
        self._timing = timing
        self._lanes = [Lane(spec) for spec in workers]
        roles = [spec.role for spec in workers]
        self._whole = [n for n, role in enumerate(roles) if role is not Role.PREFILL]
        self._prefills = [n for n, role in enumerate(roles) if role is Role.PREFILL]
        self._decodes = [n for n, role in enumerate(roles) if role is Role.DECODE]
        self._sample = sample
        count = len(requests)
        self._first = [math.nan] * count
        self._last = [math.nan] * count
        self._refused = np.zeros(count, dtype=bool)
        self._by = np.full((2, count), -1, dtype=np.int32)
        self._decoder = [-1] * count  # of a split request
        self._outputs = OUTPUT_TOKENS
        self._free = [0.0] * len(workers)  # until when each prefill worker is busy
        self._sending = [0.0] * len(workers)
        self._receiving = [0.0] * len(workers)
        self._transferred = 0.0
        self._events = 0

    def run(self) -> Outcome:
        delay = self._timing.network_s + self._timing.tokenise_s
        for number, request in enumerate(self._requests):
            self._place(number, request, request.at + delay)
        for at, lane in enumerate(self._lanes):
            self._tell(lane.finish(), at)
        requests = self._requests
        network = self._timing.network_s
        return Outcome(
            at=np.array([request.at for request in requests]),
            first=np.array(self._first) + network,
            last=np.array(self._last) + network,
            outputs=np.array([request.output for request in requests]),
            refused=self._refused,
            prefilled=self._by[0],
            decoded=self._by[1],
            busy=np.array([lane.busy for lane in self._lanes]),
            events=self._events,
            transferred=self._transferred,
        )

    def _place(self, number: int, request: Arrival, now: float) -> None:
        tokens, output = request.input, request.output
        expected = min(self._outputs, output)
        best, chosen = math.inf, -1
        for at in self._some(self._whole):
            lane = self._lanes[at]
            if lane.due <= now:
                self._tell(lane.advance(now), at)
            cost, running = lane.cost, lane.running
            step = cost.decode_step_s(running, lane.context)
            room = max(1, self._workers[at].max_step_tokens - running)
            waiting = (lane.queued + tokens) * (cost.token + step / room)
            price = waiting + expected * (step + cost.sequence)
            if self._workers[at].role is Role.DECODE and self._prefills:
                price += 1e9
            if price < best:
                best, chosen = price, at
        prefill = self._soonest(tokens, now) if self._prefills and best > 1e8 else -1
        if max(tokens + output, 1) > self._workers[chosen].kv_tokens:
            self._refused[number] = True
            return
        self._by[:, number] = prefill if prefill >= 0 else chosen, chosen
        if prefill < 0:
            self._tell(self._lanes[chosen].add(Prompt(number, tokens, output), now), chosen)
        else:
            self._hand_over(number, request, prefill, chosen, now)

    def _some(self, numbers: list[int]) -> Sequence[int]:
        if len(numbers) <= SHORTLIST or self._sample is None:
            return numbers
        return [numbers[at] for at in self._sample(len(numbers))]

    def _soonest(self, tokens: int, now: float) -> int:
        """The prefill worker that would be done first."""
        return min(
            self._some(self._prefills),
            key=lambda at: max(self._free[at], now) + self._prompt_s(at, tokens),
        )

    def _prompt_s(self, at: int, tokens: int) -> float:
        cost, chunk = self._workers[at].cost, self._workers[at].max_step_tokens
        return cost.prefill_s(tokens, chunk=chunk)

    def _hand_over(
        self, number: int, request: Arrival, prefill: int, decode: int, now: float
    ) -> None:
        """Prompts are computed in turn; then the KV cache takes its time on both links."""
        tokens = request.input
        begun = max(self._free[prefill], now)
        seconds = self._prompt_s(prefill, tokens)
        end = self._free[prefill] = begun + seconds
        self._lanes[prefill].busy += seconds
        self._first[number] = end
        if request.output == 1:
            self._ended(number, end)
            return
        sender, receiver = self._workers[prefill].cost, self._workers[decode].cost
        size = tokens * sender.kv_token_bytes
        ready = begun if self._timing.overlap else end
        sent = max(ready, self._sending[prefill]) + size / sender.link_bytes_s
        taken = max(ready, self._receiving[decode]) + size / receiver.link_bytes_s
        self._sending[prefill], self._receiving[decode] = sent, taken
        slowest = min(sender.link_bytes_s, receiver.link_bytes_s)
        self._transferred += size
        arrival = max(sent, taken, end + TAIL * size / slowest) + self._timing.network_s
        self._lanes[decode].arrive(number, tokens, request.output, arrival)

    def _tell(self, told: list[Ended], at: int) -> None:
        self._events += len(told)
        for each in told:
            if each.first:
                self._first[each.request] = each.at
            if each.last:
                self._ended(each.request, each.at)

    def _ended(self, number: int, at: float) -> None:
        self._last[number] = at
        self._outputs += LEARN * (self._requests[number].output - self._outputs)
