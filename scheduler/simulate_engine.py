"""A simulated worker: the live batching and block accounting, with a cost model for the time.

Between two changes of its batch a worker that only decodes runs steps which differ in nothing but
their contexts' length. These are run at once, `Batch.skip`; a change that arrives meanwhile cuts
the run at the end of the step that it falls into, as it would in a live engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.batching import Batcher, Sequence, Step
from scheduler.blocks import BlockPool, blocks_for
from scheduler.cost import StepShape
from scheduler.models import BLOCK_TOKENS
from scheduler.pacing import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from scheduler.simulate_spec import WorkerSpec

PREFIX_BLOCKS = 512 // BLOCK_TOKENS  # blocks of one prefix id: Mooncake's traces hash 512 tokens
_NUMBERS = [number.to_bytes(4, "little") for number in range(1 << 14)]


class PreemptedUnnamed(Exception):
    """What is computed anew depends on the names of blocks: simulate it all with names."""


@dataclass(eq=False, slots=True)
class Simulated(Sequence):
    """A sequence whose tokens are only counted, and whose blocks are named without hashing.

    `prefix` as in `workload.Arrival`; `own` names what follows,
    which only it itself finds again, after a preemption. Without it there are no names.
    """

    prefix: tuple[int, ...] = ()
    own: bytes = b""
    number: int = 0  # of its request
    begun: float = -1.0  # when its first step did

    def block_names(self, count: int) -> list[bytes]:
        names = self.names
        if not self.own:
            return names
        for index in range(len(names), count):
            piece = index // PREFIX_BLOCKS
            if piece < len(self.prefix) and (index + 1) * BLOCK_TOKENS <= self.prompt_len:
                before = b"p" + self.prefix[piece].to_bytes(8, "little")
                names.append(before + _NUMBERS[index % PREFIX_BLOCKS])
            else:
                names.append(self.own + _NUMBERS[index])
        return names[:count]


class Counted(BlockPool):
    """Blocks without names, so that nobody asks which they are: only how many are free is kept."""

    def __init__(self, size: int) -> None:
        super().__init__(0)
        self.size = self._free = size

    @property
    def free(self) -> int:
        return self._free

    def allocate(self, count: int) -> list[int]:
        assert count <= self._free, f"{count} blocks asked for, {self._free} free"
        self._free -= count
        return [0] * count

    def release(self, blocks: Collection[int]) -> None:
        self._free += len(blocks)


class Batch(Batcher):
    """The live batcher, which can also say how many steps are alike, and run these at once."""

    def alike(self) -> int:
        """How many steps from now on each add one token to each running sequence, and that is all.

        At least 1, or 0 where the next step is of another kind. The last of them may end a
        sequence, and then the one after it is another matter.
        """
        running = self.running
        if not running or len(running) > self.max_step_tokens:
            return 0
        if self.waiting and len(running) < self.max_sequences and self._may_admit():
            return 0
        steps = 1 << 30
        room = 0
        for sequence in running:
            length = len(sequence.tokens)
            if length - sequence.computed != 1 or length == sequence.prompt_len:
                return 0  # a prompt, or its last token, after which it is told
            left = sequence.max_tokens + sequence.prompt_len - length
            if left < steps:
                steps = left
            room += len(sequence.blocks) * BLOCK_TOKENS - length
        return self._fitting(steps)

    def skip(self, steps: int) -> None:
        """Run so many steps of those alike."""
        allocate, zeros = self.pool.allocate, bytes(steps)
        for sequence in self.running:
            sequence.tokens.extend(zeros)
            computed = sequence.computed
            sequence.computed = computed + steps
            # The newest token's block is taken by the step that computes it, not the one before.
            needed = blocks_for(computed + steps) - len(sequence.blocks)
            if needed > 0:
                sequence.blocks += allocate(needed)
            first = computed // BLOCK_TOKENS
            if first != (computed + steps) // BLOCK_TOKENS:
                self._name(sequence, first)

    def _name(self, sequence: Sequence, first: int) -> None:
        assert isinstance(sequence, Simulated), "all are"
        if sequence.own:
            super()._name(sequence, first)

    def _preempt(self, sequence: Sequence) -> None:
        assert isinstance(sequence, Simulated), "all are"
        if not sequence.own:
            raise PreemptedUnnamed
        super()._preempt(sequence)

    def _may_admit(self) -> bool:
        """Whether the next of those waiting gets in, or looks at cached blocks in trying to."""
        sequence = self.waiting[0]
        needed = blocks_for(len(sequence.tokens))
        if needed <= self.pool.free:
            return True
        if sequence.awaits_kv or sequence.read:
            return False
        known = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        return bool(self.pool.find(sequence.block_names(min(known, 1))))

    def _fitting(self, most: int) -> int:
        """The most steps of these for which there are blocks, so that nobody is preempted."""
        free = self.pool.free
        if len(self.running) * (most // BLOCK_TOKENS + 1) <= free:
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            wanted = sum(
                max(0, blocks_for(s.computed + middle) - len(s.blocks)) for s in self.running
            )
            low, high = (middle, high) if wanted <= free else (low, middle - 1)
        return low


@dataclass(slots=True)
class Told:
    """What a worker's owner hears, between its steps. The time is when the step ended."""

    token: Callable[[Simulated, float], None]  # it has its first token
    finished: Callable[[Simulated, float], None]
    granted: Callable[[Simulated, float], None]
    held: Callable[[Simulated, float, float], None]  # and since when its prompt was computed


class Worker:
    """One engine on simulated time: `add`, `resume` and `free` between its steps, then `ended`.

    `at(seconds, version)` asks for a call of `ended(version)` then. A version that is not the
    newest one is of a run that was cut.
    """

    def __init__(
        self,
        number: int,
        spec: WorkerSpec,
        told: Told,
        at: Callable[[float, Worker, int], None],
        *,
        named: bool = True,
    ) -> None:
        self.number = number
        self.spec = spec
        blocks = spec.kv_tokens // BLOCK_TOKENS
        self.batch = Batch(
            BlockPool(blocks) if named else Counted(blocks),
            max_step_tokens=spec.max_step_tokens,
            max_sequences=spec.max_sequences,
            pace=Pace(spec.itl_bound_s),
        )
        self.cost = spec.cost
        self.busy = 0.0
        self._told = told
        self._at = at
        self._step: Step | None = None
        self._alike = 0  # steps of the run that is under way
        self._since = 0.0
        self._first = self._growth = 0.0  # seconds of its first step, and by which each is longer
        self._version = 0
        self._between: list[Callable[[], None]] = []

    def check(self, tokens: int) -> bool:
        """Whether its cache ever holds so many."""
        return blocks_for(tokens) <= self.batch.pool.size

    def emitted(self, now: float) -> dict[int, int]:
        """Tokens that each running sequence has given, by its request's number."""
        more = 0
        if self._alike > 1:  # those of the run that is under way are not in the sequences yet
            more = (
                min(self._alike, _steps_to_cover(now - self._since, self._first, self._growth)) - 1
            )
        return {s.number: s.position + more for s in self.batch.running if isinstance(s, Simulated)}

    def soon(self, change: Callable[[], None], now: float) -> None:
        """Apply a change now, or after the step that is running."""
        self._between.append(change)
        if self._step is None and not self._alike:
            self._go_on(now)
        elif self._alike > 1:
            self._cut(now)

    def ended(self, version: int, now: float) -> None:
        """The step or the run that was asked for is over, unless it was cut meanwhile."""
        if version != self._version:
            return
        if self._alike:
            self._end_run(now)
        else:
            self._end_step(now)
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """Apply what waited, then begin the next step or run, if there is anything to do."""
        while True:
            changes, self._between = self._between, []
            for change in changes:
                change()
            steps = self.batch.alike()
            if steps:
                self._run(steps, now)
                return
            step = self.batch.next_step()
            if step.slices:
                self._begin(step, now)
                return
            if not step.granted:
                return
            self._grant(step, now)

    def _begin(self, step: Step, now: float) -> None:
        self._step, self._since = step, now
        seconds = self.cost.predict(StepShape.of(step))
        self._ask(now + seconds)

    def _run(self, steps: int, now: float) -> None:
        batch = len(self.batch.running)
        context = sum([len(s.tokens) for s in self.batch.running])
        self._alike, self._since = steps, now
        self._first = self.cost.decode_step_s(batch, context)
        self._growth = self.cost.context * batch
        self._ask(now + self._run_s(steps))

    def _run_s(self, steps: int) -> float:
        """Seconds of the first so many steps of the run."""
        return steps * self._first + self._growth * (steps * (steps - 1) / 2)

    def _cut(self, now: float) -> None:
        """Let the run end with the step that is under way."""
        wait = now - self._since
        steps = _steps_to_cover(wait, self._first, self._growth)
        while steps > 1 and self._run_s(steps - 1) >= wait:
            steps -= 1
        while self._run_s(steps) < wait:
            steps += 1
        if steps < self._alike:
            self._alike = steps
            self._ask(self._since + self._run_s(steps))

    def _ask(self, then: float) -> None:
        self._version += 1
        self._at(then, self, self._version)

    def _end_run(self, now: float) -> None:
        steps, self._alike = self._alike, 0
        self.busy += now - self._since
        self.batch.skip(steps)
        running = self.batch.running
        pace = self.batch.pace
        if pace.bound_s is not None:
            for number in range(steps):
                pace.learn(len(running), 0, self._first + number * self._growth)
        for sequence in [s for s in running if len(s.tokens) - s.prompt_len >= s.max_tokens]:
            assert isinstance(sequence, Simulated), "all are"
            self.batch.remove(sequence)
            self._told.finished(sequence, now)

    def _end_step(self, now: float) -> None:
        step, self._step = self._step, None
        assert step, "a step that ends has begun"
        seconds = now - self._since
        self.busy += seconds
        self.batch.advance(step)
        self.batch.pace.learn(step.decodes, step.prompt_tokens, seconds)
        for piece in step.slices:
            sequence = piece.sequence
            assert isinstance(sequence, Simulated), "all are"
            if sequence.hold and sequence.begun < 0:
                sequence.begun = self._since
            if piece.end == len(sequence.tokens):
                self._give(sequence, now)
        self._grant(step, now)

    def _give(self, sequence: Simulated, now: float) -> None:
        """It draws a token: the first one is told, and the last one."""
        tokens = sequence.tokens
        tokens.append(0)
        position = len(tokens) - sequence.prompt_len
        if position == 1:
            self._told.token(sequence, now)
        if position >= sequence.max_tokens:
            self.batch.remove(sequence)
            self._told.finished(sequence, now)
        elif sequence.hold:
            self.batch.stage(sequence)
            self._told.held(sequence, now, sequence.begun)

    def _grant(self, step: Step, now: float) -> None:
        for sequence in step.granted:
            assert isinstance(sequence, Simulated), "all are"
            self._told.granted(sequence, now)


def _steps_to_cover(wait: float, first: float, growth: float) -> int:
    """About the fewest steps n with n·first + growth·n(n-1)/2 ≥ wait, at least 1."""
    if growth == 0:
        return max(1, math.ceil(wait / first))
    half = first - growth / 2
    return max(1, math.ceil((math.sqrt(half * half + 2 * growth * wait) - half) / growth))
