"""A worker in closed form: what its batch does between two changes, in one sum.

Continuous batching with chunked prefill as in `scheduler/batching`, but in lumps: all pieces of a
prompt beside those who decode, or all steps until somebody's last one. A prompt that follows another
begins in the same step. Blocks are counted as tokens, and nobody is preempted.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from scheduler.cost import context_sum

if TYPE_CHECKING:
    from scheduler.simulate_spec import WorkerSpec


def steps_to_cover(wait: float, first: float, growth: float) -> int:
    """The fewest steps n with n·first + growth·n(n-1)/2 ≥ wait, at least 1, but for rounding."""
    if growth == 0:
        return max(1, math.ceil(wait / first))
    half = first - growth / 2
    return max(1, math.ceil((math.sqrt(half * half + 2 * growth * wait) - half) / growth))


class Prompt(NamedTuple):
    request: int
    tokens: int
    output: int


class Ended(NamedTuple):
    """What `advance` tells of a request: its first token, its last one, or both at once."""

    request: int
    at: float
    first: bool
    last: bool


class Lane:
    """One worker. `due`: before then no request begins or ends to decode, as things stand."""

    __slots__ = (
        "_arriving",
        "_carry",
        "_chunk",
        "_left",
        "_queue",
        "_running",
        "_step",
        "busy",
        "context",
        "cost",
        "due",
        "kv_tokens",
        "now",
        "places",
        "queued",
    )

    def __init__(self, spec: WorkerSpec) -> None:
        self.cost = spec.cost
        self.kv_tokens = spec.kv_tokens
        self.places = spec.max_sequences
        self._chunk = spec.max_step_tokens
        self.now = 0.0
        self.busy = 0.0
        self.context = 0  # tokens of those who decode
        self.queued = 0  # prompt tokens that are not computed
        self.due = math.inf
        self._step = 0
        self._carry = 0.0  # of a step that prompts have filled in part
        self._running: list[tuple[int, int, int]] = []  # heap: its last step, request, tokens then
        self._queue: deque[Prompt] = deque()
        self._left = 0  # tokens of the prompt at the head; 0: it has not begun
        self._arriving: list[tuple[float, int, int, int]] = []  # heap: when, request, tokens, steps

    @property
    def running(self) -> int:
        """Who decodes here, or will."""
        return len(self._running) + len(self._queue) + len(self._arriving)

    def add(self, prompt: Prompt, now: float) -> list[Ended]:
        """Compute it here, and decode it unless its output is one token."""
        told = self.advance(now)
        self._queue.append(prompt)
        self.queued += prompt.tokens
        self.due = 0.0
        return told

    def arrive(self, request: int, tokens: int, output: int, at: float) -> None:
        """From then on decode what another worker began: `tokens` is its prompt."""
        heapq.heappush(self._arriving, (at, request, tokens, output - 1))
        self.due = min(self.due, at)

    def advance(self, until: float) -> list[Ended]:
        """Everything that is over by then."""
        told: list[Ended] = []
        while self.now < until:
            self._take_in()
            if self._admitted():
                if not self._prefill(until, told):
                    return told
            elif self._running:
                self._decode(until, told)
            elif self._arriving:
                self.now = max(self.now, min(until, self._arriving[0][0]))
            else:
                self.now = until
        self._set_due()
        return told

    def finish(self) -> list[Ended]:
        """Everything that is left."""
        told: list[Ended] = []
        while self._running or self._queue or self._arriving:
            told += self.advance(max(self.now, self.due) + 3600.0)
        return told

    def _take_in(self) -> None:
        arriving = self._arriving
        while arriving and arriving[0][0] <= self.now and self._fits(arriving[0][2]):
            _, request, tokens, steps = heapq.heappop(arriving)
            self._begin(request, tokens + 1, steps)

    def _begin(self, request: int, tokens: int, steps: int) -> None:
        heapq.heappush(self._running, (self._step + steps, request, tokens + steps))
        self.context += tokens

    def _admitted(self) -> bool:
        """Whether the prompt at the head is computed now; an empty worker takes any."""
        if not self._queue or self._left:
            return bool(self._queue)
        if not self._fits(self._queue[0].tokens):
            return False
        self._left = self._queue[0].tokens
        return True

    def _fits(self, tokens: int) -> bool:
        running = len(self._running)
        room = running < self.places and self.context + tokens <= self.kv_tokens
        return room or not running

    def _prefill(self, until: float, told: list[Ended]) -> bool:
        """Its pieces up to the next change; False if that is later than `until`."""
        cost, batch, prompt = self.cost, len(self._running), self._queue[0]
        room = max(1, self._chunk - batch)
        left = self._left
        pieces = left / room if len(self._queue) > 1 else -(-left // room)
        if batch and self._running[0][0] - self._step < pieces:
            pieces = max(1, self._running[0][0] - self._step)
        tokens = min(left, math.ceil(pieces * room))
        done = prompt.tokens - left
        first = cost.step + cost.sequence * batch + cost.context * self.context
        seconds = (
            pieces * first
            + cost.context * batch * pieces * (pieces - 1) / 2
            + cost.token * tokens
            + cost.attend * context_sum(done, done + tokens)
        )
        if self.now + seconds > until:
            self.due = self.now + seconds
            return False
        whole, self._carry = divmod(self._carry + pieces, 1.0)
        self._pass(seconds, int(whole))
        self._left -= tokens
        self.queued -= tokens
        if not self._left:
            self._queue.popleft()
            told.append(Ended(prompt.request, self.now, True, prompt.output == 1))
            if prompt.output > 1:
                self._begin(prompt.request, prompt.tokens + 1, prompt.output - 1)
        self._release(told)
        return True

    def _decode(self, until: float, told: list[Ended]) -> None:
        """Steps until one is somebody's last, or until a request arrives."""
        cost, batch = self.cost, len(self._running)
        first = cost.step + cost.sequence * batch + cost.context * self.context
        growth = cost.context * batch
        steps = self._running[0][0] - self._step
        wait = (min(until, self._arriving[0][0]) if self._arriving else until) - self.now
        if steps * first + growth * (steps * (steps - 1) / 2) > wait:
            steps = min(steps, steps_to_cover(wait, first, growth))
        self._pass(steps * first + growth * (steps * (steps - 1) / 2), steps)
        self._release(told)

    def _pass(self, seconds: float, steps: int) -> None:
        self.now += seconds
        self.busy += seconds
        self._step += steps
        self.context += steps * len(self._running)

    def _release(self, told: list[Ended]) -> None:
        running = self._running
        while running and running[0][0] <= self._step:
            last, request, tokens = heapq.heappop(running)
            self.context -= tokens + self._step - last
            told.append(Ended(request, self.now, False, True))

    def _set_due(self) -> None:
        """When the next one ends, if nothing else happens."""
        cost, batch = self.cost, len(self._running)
        self.due = self._arriving[0][0] if self._arriving else math.inf
        if self._queue:
            self.due = min(self.due, self.now)
        elif batch:
            steps = self._running[0][0] - self._step
            first = cost.step + cost.sequence * batch + cost.context * self.context
            self.due = min(self.due, self.now + steps * first)
