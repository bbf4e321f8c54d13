"""What runs in the next step: continuous batching with chunked prefill, one token budget a step.

A sequence is in exactly one place:

    waiting ──admit──► running ──finish──► gone          (blocks: none · all computed · none)
       │  ▲               │ │
       │  └───preempt─────┘ └──hold──► staged ──► gone    prefill worker: KV waits for its push
       └──admit (awaits_kv)──► staged ──resume──► running decode worker: blocks wait for their KV

Decodes go first, so a long prompt never starves them; what is left of the budget goes to prompts,
in chunks: by priority, then fair share, then the earliest deadline, then age. When blocks run out
the youngest running sequence is preempted: it frees its blocks and computes them anew later,
before any prompt that has not begun, which changes no token.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from scheduler.blocks import BlockPool, block_hash, blocks_for
from scheduler.models import BLOCK_TOKENS
from scheduler.pacing import Pace

if TYPE_CHECKING:
    from scheduler.request import Job, TokenIds


Due = tuple[int, int, float]  # (priority, share, deadline in seconds of the worker's clock)
WHENEVER: Due = (0, 0, math.inf)
AT_ONCE: Due = (-(1 << 63), 0, 0.0)  # it has given tokens already


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of one job: its tokens, and how many of them have their KV in the cache."""

    job: Job
    choice: int
    tokens: TokenIds  # prompt, then what was emitted
    prompt_len: int
    max_tokens: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as asked for
    cached: int = 0  # prompt tokens that were in the cache when it was first admitted
    forks: tuple[int, ...] = ()  # further choices that start from this prompt's KV
    hold: bool = False  # after the first token, keep the KV for a push
    awaits_kv: bool = False  # admitted only to hold blocks, until `resume`
    draft: TokenIds = field(default_factory=list)  # what may follow, to be verified in one pass
    due: Due = WHENEVER  # a lower one goes first
    age: int = 0  # smaller: it came earlier
    read: bool = False  # something is read off its prompt's rows, so cached blocks do not help

    @property
    def turn(self) -> tuple[Due, int]:
        """By which prompts are ordered."""
        return self.due, self.age

    @property
    def position(self) -> int:
        """Index of the next token among the emitted ones: what sampling noise depends on."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.tokens) - self.computed

    def block_names(self, count: int) -> list[bytes]:
        """Names of its first `count` blocks, all of them full."""
        for index in range(len(self.names), count):
            before = self.names[-1] if self.names else b""
            start = index * BLOCK_TOKENS
            self.names.append(block_hash(before, self.tokens[start : start + BLOCK_TOKENS]))
        return self.names[:count]


class Slice(NamedTuple):
    """Tokens [start, end) of a sequence, computed in one step, and a draft of those after them."""

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> TokenIds:
        """What is computed: one row of the model each."""
        return [*self.sequence.tokens[self.start : self.end], *self.draft]

    @property
    def draws(self) -> int:
        """Tokens drawn after this slice: one a choice, or one a position of a draft and its end."""
        return len(self.choices) + len(self.draft)

    @property
    def choices(self) -> tuple[int, ...]:
        """The choices that draw a token after this slice: none while the prompt is unfinished."""
        if self.end < len(self.sequence.tokens):
            return ()
        return (self.sequence.choice, *self.sequence.forks)


@dataclass(frozen=True, slots=True)
class Step:
    """One step's work, and the reservations that were granted while planning it."""

    slices: tuple[Slice, ...]
    granted: tuple[Sequence, ...]

    @property
    def decodes(self) -> int:
        return sum(1 for piece in self.slices if piece.end - piece.start == 1)

    @property
    def drafted(self) -> int:
        return sum(len(piece.draft) for piece in self.slices)

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.end - piece.start for piece in self.slices) - self.decodes


class Batcher:
    """Chooses each step's slices. Pure: it is told of every event and asks no clock."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_step_tokens: int = 512,
        max_sequences: int = 64,
        pace: Pace | None = None,
    ) -> None:
        self.pool = pool
        self.pace = pace or Pace()
        self.max_step_tokens = max_step_tokens
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []  # whose turn is next comes first
        self.running: list[Sequence] = []  # oldest first
        self.staged: list[Sequence] = []
        self.preempted = 0
        self._ages = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        sequence.age = next(self._ages)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its blocks. Idempotent."""
        for place in (self.waiting, self.running, self.staged):
            if sequence in place:
                place.remove(sequence)
        self._free(sequence)

    def stage(self, sequence: Sequence) -> None:
        """Keep a running sequence's KV, but compute no more of it."""
        self.running.remove(sequence)
        self.staged.append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Its KV has arrived: the sequence decodes from the next step on."""
        self.staged.remove(sequence)
        self.running.append(sequence)
        self._name(sequence, 0)

    def fork(self, parent: Sequence, child: Sequence) -> list[tuple[int, int]]:
        """Start `child` from the parent's prompt KV; gives the (from, to) blocks to copy.

        Whole prompt blocks are shared. The last, partly filled one is copied, since the two will
        write different tokens into it. Without a free block the child waits and recomputes.
        """
        whole, partial = divmod(child.prompt_len, BLOCK_TOKENS)
        if self.pool.free < bool(partial) or parent.computed < child.prompt_len:
            self.add(child)
            return []
        shared = parent.blocks[:whole]
        own = self.pool.allocate(1) if partial else []
        self.pool.share(shared)
        child.blocks = shared + own
        child.computed = child.prompt_len
        child.names = parent.block_names(whole)
        self.running.append(child)
        return [(parent.blocks[whole], own[0])] if partial else []

    def next_step(self) -> Step:
        """Plan one step. Sequences it names have blocks for every token it lists."""
        decodes = self._decodes()
        budget = self.pace.prompt_tokens(len(decodes), self.max_step_tokens - len(decodes))
        prefills: list[Slice] = []
        granted: list[Sequence] = []
        begun = [sequence for sequence in self.running if sequence.remaining > 1]
        for sequence in sorted(begun, key=_turn):
            budget = self._admit(budget, prefills, granted, before=sequence)
            if budget > 0:
                budget -= self._chunk(sequence, budget, prefills)
        self._admit(budget, prefills, granted)
        return Step((*decodes, *prefills), tuple(granted))

    def advance(self, step: Step) -> None:
        """The step has run: its slices' KV is in the cache, and full blocks get their names."""
        for piece in step.slices:
            sequence = piece.sequence
            sequence.computed = piece.end
            self._name(sequence, piece.start // BLOCK_TOKENS)

    def accept(self, sequence: Sequence, count: int) -> None:
        """So many tokens of its draft were right, and have been appended: their KV stays."""
        first = sequence.computed // BLOCK_TOKENS
        sequence.computed += count
        self._name(sequence, first)

    def restart(self) -> None:
        """The cache's content is lost: everybody who runs computes anew, oldest first."""
        for sequence in self.running[::-1]:
            self._preempt(sequence)
        self.pool.forget()

    def check_integrity(self) -> None:
        """No block is lost: what is not free belongs to a sequence that we know."""
        self.pool.check_integrity()
        held = {b for place in (self.running, self.staged) for s in place for b in s.blocks}
        assert len(held) + self.pool.free == self.pool.size, "a block belongs to nobody"
        assert all(not s.blocks for s in self.waiting), "a waiting sequence holds blocks"

    def _decodes(self) -> list[Slice]:
        """One slice for each running sequence that has one token to compute."""
        slices: list[Slice] = []
        before = self.preempted
        for sequence in list(self.running):
            if sequence.remaining != 1:
                continue  # still a prompt
            if self.preempted != before and sequence not in self.running:
                continue  # preempted just now for an older one
            if len(slices) == self.max_step_tokens:
                break
            if self._grow(sequence):
                draft = tuple(self._room(sequence))
                slices.append(Slice(sequence, sequence.computed, len(sequence.tokens), draft))
        return slices

    def _room(self, sequence: Sequence) -> TokenIds:
        """Its draft, with blocks for it; nobody is preempted for a guess."""
        if not sequence.draft:
            return []
        draft, sequence.draft = sequence.draft, []
        needed = blocks_for(len(sequence.tokens) + len(draft)) - len(sequence.blocks)
        if needed > self.pool.free:
            return []
        sequence.blocks += self.pool.allocate(max(0, needed))
        return draft

    def _grow(self, sequence: Sequence) -> bool:
        """Give the sequence a block for its newest token; False if it was itself preempted."""
        needed = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if needed <= 0:  # as in most steps; a draft may have left some over
            return True
        while needed > self.pool.free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.pool.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        sequence.due = AT_ONCE
        self._wait(sequence)
        self.preempted += 1

    def _wait(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_turn)

    def _admit(
        self,
        budget: int,
        prefills: list[Slice],
        granted: list[Sequence],
        before: Sequence | None = None,
    ) -> int:
        """Move waiting sequences, in turn, to where they can go on; gives what is left of budget.

        With `before`, only those whose turn is earlier. A reservation computes nothing, so it does
        not wait for a budget; but nobody passes one who waits for blocks.
        """
        at = 0
        while at < len(self.waiting) and len(self.running) < self.max_sequences:
            sequence = self.waiting[at]
            if before and _turn(sequence) > _turn(before):
                break
            if budget <= 0 and not sequence.awaits_kv:
                at += 1
                continue
            if not self._hold(sequence):
                break
            del self.waiting[at]
            if sequence.awaits_kv:
                self.staged.append(sequence)
                granted.append(sequence)
            else:
                self.running.append(sequence)
                budget -= self._chunk(sequence, budget, prefills)
        return budget

    def _hold(self, sequence: Sequence) -> bool:
        """Take blocks for all of a sequence's tokens, those that are cached as they are.

        At least the last token is computed, since its logits are wanted. KV that is to arrive goes
        into blocks of its own: others may be reading the cached ones.
        """
        known = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        if sequence.awaits_kv or sequence.read:
            known = 0
        found = self.pool.find(sequence.block_names(known))
        self.pool.share(found)
        needed = blocks_for(len(sequence.tokens)) - len(found)
        if needed > self.pool.free:
            self.pool.release(found)
            return False
        sequence.blocks = found + self.pool.allocate(needed)
        sequence.computed = len(found) * BLOCK_TOKENS
        if not sequence.position:
            sequence.cached = sequence.computed
        return True

    def _name(self, sequence: Sequence, first: int) -> None:
        """Name the full blocks from the first on that were just computed."""
        full = sequence.computed // BLOCK_TOKENS
        names = sequence.block_names(full)
        for index in range(first, full):
            self.pool.name(sequence.blocks[index], names[index])

    @staticmethod
    def _chunk(sequence: Sequence, budget: int, prefills: list[Slice]) -> int:
        """Add the sequence's next piece of at most `budget` tokens; gives its length."""
        length = min(sequence.remaining, budget)
        prefills.append(Slice(sequence, sequence.computed, sequence.computed + length))
        return length

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


_turn = attrgetter("turn")
