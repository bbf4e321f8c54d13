"""A worker in closed form: what its batch does between two changes, in one sum.

Continuous batching with chunked prefill as in `scheduler/batching`, but in lumps: all pieces of a
prompt beside those who decode, or all steps until somebody's last one. A prompt that follows
another begins in the same step. Blocks are counted as tokens, and nobody is preempted.
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
    """About the fewest steps n with n·first + growth·n(n-1)/2 ≥ wait, at least 1."""
    if growth == 0:
        return max(1, math.ceil(wait / first))
    half = first - growth / 2
    return max(1, math.ceil((math.sqrt(half * half + 2 * growth * wait) - half) / growth))


class Prompt(NamedTuple):
    """`output` tokens are drawn here: 1 where another worker goes on."""

    request: int
    tokens: int
    output: int


class Said(NamedTuple):
    """A request's first token, its last one here, or both at once."""

    request: int
    at: float
    first: bool
    last: bool


class Lane:
    """One worker. `due`: when the next request begins to decode, or ends, as things stand."""

    __slots__ = (
        "_arriving",
        "_carry",
        "_left",
        "_next",
        "_running",
        "_spec",
        "busy",
        "context",
        "cost",
        "due",
        "now",
        "promised",
        "queue",
        "queued",
        "reserved",
        "step",
    )

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self.cost = spec.cost
        self.now = 0.0
        self.busy = 0.0
        self.due = math.inf
        self.context = 0  # tokens of those who decode
        self.queue: deque[Prompt] = deque()
        self.queued = 0  # prompt tokens that are not computed
        self.step = 0  # how many have run
        self.promised = 0  # requests that will arrive
        self.reserved = 0  # tokens of these
        self._carry = 0.0  # of a step that prompts have filled in part
        self._running: list[tuple[int, int, int]] = []  # heap: last step, request, tokens then
        self._left = 0  # tokens of the prompt at the head; 0: it has not begun
        self._arriving: list[tuple[float, int, int, int]] = []  # heap: when, request, tokens, steps
        self._next: tuple[float, float, int] | None = None  # a lump, as long as nothing changes

    @property
    def step_s(self) -> float:
        """Seconds of a step of those who decode now; 0 if there are none."""
        batch = len(self._running)
        return self.cost.decode_step_s(batch, self.context) if batch else 0.0

    def add(self, prompt: Prompt, now: float) -> list[Said]:
        """A prompt comes: after the step that is running."""
        said = self.advance(now)
        self.queue.append(prompt)
        self.queued += prompt.tokens
        self._set_due()
        return said

    def reserve(self, tokens: int) -> bool:
        """Keep a place and blocks for a request that will arrive. False: there are none now."""
        if not self._fits(tokens):
            return False
        self.promised += 1
        self.reserved += tokens
        return True

    def arrive(self, request: int, tokens: int, output: int, at: float) -> None:
        """From then on decode what was reserved for: `tokens` is the prompt."""
        heapq.heappush(self._arriving, (at, request, tokens, output - 1))
        self._set_due()

    def advance(self, until: float) -> list[Said]:
        """Everything that is over by then."""
        said: list[Said] = []
        while self.now < until:
            self._take_in()
            if self._admitted():
                if not self._prefill(until, said):
                    break
            elif self._running:
                self._decode(until, said)
            elif self._arriving:
                self.now = max(self.now, min(until, self._arriving[0][0]))
            else:
                self.now = until
        self._take_in()
        self._set_due()
        return said

    def _take_in(self) -> None:
        arriving = self._arriving
        while arriving and arriving[0][0] <= self.now:
            _, request, tokens, steps = heapq.heappop(arriving)
            self.promised -= 1
            self.reserved -= tokens
            self._begin(request, tokens + 1, steps)

    def _begin(self, request: int, tokens: int, steps: int) -> None:
        self._next = None
        last = self.step + steps
        heapq.heappush(self._running, (last, request, tokens + steps))
        self.context += tokens

    def _fits(self, tokens: int) -> bool:
        """Whether there are places and blocks; an empty worker takes any."""
        held, spec = len(self._running) + self.promised, self._spec
        return not held or (
            held < spec.max_sequences and self.context + self.reserved + tokens <= spec.kv_tokens
        )

    def _admitted(self) -> bool:
        """Whether the prompt at the head is computed now; where nobody decodes it always is.

        Otherwise two workers could wait for the prompts that they have promised each other.
        """
        if self.queue and not self._left:
            tokens = self.queue[0].tokens
            if not self._running or self._fits(tokens):
                self._left = tokens
        return self._left > 0

    def _lump(self) -> tuple[float, float, int]:
        """Of the prompt at the head up to the next change: steps, seconds, tokens."""
        cost, running, left = self.cost, self._running, self._left
        batch = len(running)
        room = max(1, self._spec.max_step_tokens - batch)
        # The last piece shares its step with the next prompt, if there is one.
        pieces = left / room if len(self.queue) > 1 else float(-(-left // room))
        if batch and running[0][0] - self.step < pieces:
            pieces = float(max(1, running[0][0] - self.step))
        tokens = min(left, math.ceil(pieces * room))
        done = self.queue[0].tokens - left
        first = cost.step + cost.sequence * batch + cost.context * self.context
        seconds = pieces * first + cost.token * tokens
        seconds += cost.attend * context_sum(done, done + tokens)
        seconds += cost.context * batch * pieces * max(0.0, pieces - 1) / 2
        return pieces, seconds, tokens

    def _prefill(self, until: float, said: list[Said]) -> bool:
        """One lump; False if it ends later than `until`."""
        pieces, seconds, tokens = self._next or self._lump()
        if self.now + seconds > until:
            return False
        whole, self._carry = divmod(self._carry + pieces, 1.0)
        self._pass(seconds, int(whole))
        self._next = None
        self._left -= tokens
        self.queued -= tokens
        if not self._left:
            prompt = self.queue.popleft()
            said.append(Said(prompt.request, self.now, True, prompt.output == 1))
            if prompt.output > 1:
                self._begin(prompt.request, prompt.tokens + 1, prompt.output - 1)
        self._release(said)
        return True

    def _run(self) -> tuple[int, float, float, float]:
        """All steps until somebody's last one: how many, seconds, of the first, growth of each."""
        cost, batch = self.cost, len(self._running)
        first = cost.step + cost.sequence * batch + cost.context * self.context
        growth = cost.context * batch
        steps = self._running[0][0] - self.step
        return steps, steps * first + growth * (steps * (steps - 1) / 2), first, growth

    def _decode(self, until: float, said: list[Said]) -> None:
        """Steps until somebody's last one, until a request arrives, or until `until` is over."""
        steps, seconds, first, growth = self._run()
        if self._arriving:
            until = min(until, self._arriving[0][0])
        if self.now + seconds > until:
            steps = min(steps, steps_to_cover(until - self.now, first, growth))
            seconds = steps * first + growth * (steps * (steps - 1) / 2)
        self._pass(seconds, steps)
        self._release(said)

    def _pass(self, seconds: float, steps: int) -> None:
        self.now += seconds
        self.busy += seconds
        self.step += steps
        self.context += steps * len(self._running)

    def _release(self, said: list[Said]) -> None:
        running = self._running
        while running and running[0][0] <= self.step:
            last, request, tokens = heapq.heappop(running)
            self.context -= tokens + self.step - last
            said.append(Said(request, self.now, False, True))

    def _set_due(self) -> None:
        if self._left or (self.queue and self._admitted()):
            self._next = self._lump()
            self.due = self.now + self._next[1]
            return
        self.due = self.now + self._run()[1] if self._running else math.inf
        if self._arriving:
            self.due = min(self.due, self._arriving[0][0])
