"""Batching under any order of events: no block is lost, and whoever is left gets its turn."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batching import Batcher, Sequence
from scheduler.blocks import BlockPool, blocks_for
from scheduler.request import Job, Limits, Prompt, Sampling

JOB = Job("a", 1, "m", Prompt(text="x"), Sampling(seed=0), Limits(), 0.0)
CAPACITY = 6  # blocks
LONGEST = CAPACITY * 16


class Batching(RuleBasedStateMachine):
    """Adds, reserves, resumes, forks, holds, cancels and steps, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Sequence] = []

    @initialize(budget=st.integers(1, 40), sequences=st.integers(1, 6))
    def start(self, budget, sequences):
        self.batch = Batcher(BlockPool(CAPACITY), max_step_tokens=budget, max_sequences=sequences)

    @rule(prompt=st.integers(1, LONGEST - 1), hold=st.booleans(), forks=st.integers(0, 2))
    def add(self, prompt, hold, forks):
        self._new(prompt, hold=hold, forks=tuple(range(1, forks + 1)))

    @rule(prompt=st.integers(1, LONGEST - 1))
    def reserve(self, prompt):
        self._new(prompt, awaits_kv=True)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def resume(self, data):
        one = data.draw(st.sampled_from(self.granted))
        one.awaits_kv = False
        one.computed = len(one.tokens)
        one.tokens.append(0)
        self.batch.resume(one)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        self._end(data.draw(st.sampled_from(self.alive)))

    @rule()
    def step(self):
        step = self.batch.next_step()
        size = sum(piece.end - piece.start for piece in step.slices)
        assert size <= self.batch.max_step_tokens
        assert len({piece.sequence for piece in step.slices}) == len(step.slices)
        for piece in step.slices:
            assert piece.start == piece.sequence.computed < piece.end
            assert len(piece.sequence.blocks) >= blocks_for(piece.end)
        self.batch.advance(step)
        for piece in step.slices:
            if piece.choices:
                self._draw(piece.sequence)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "batch"):
            return
        self.batch.check_integrity()
        places = (*self.batch.waiting, *self.batch.running, *self.batch.staged)
        assert len(set(places)) == len(places), "a sequence is in two places"
        assert set(places) == set(self.alive)

    def teardown(self):
        """Whatever happened before, those that are left finish, and then every block is free."""
        for one in [s for s in self.alive if s in self.batch.staged]:
            self._end(one)
        steps = 0
        while self.alive:
            self.step()
            for one in [s for s in self.alive if s in self.batch.staged]:
                self._end(one)
            steps += 1
            assert steps < 100 * LONGEST, "somebody never gets a turn"
        assert self.batch.pool.free == CAPACITY
        super().teardown()

    @property
    def granted(self) -> list[Sequence]:
        return [s for s in self.alive if s.awaits_kv and s in self.batch.staged]

    def _new(self, prompt, **fields):
        one = Sequence(JOB, 0, [0] * prompt, prompt, max_tokens=LONGEST - prompt, **fields)
        self.alive.append(one)
        self.batch.add(one)

    def _draw(self, one: Sequence) -> None:
        """A token for the sequence, and at its prompt's end for each fork."""
        forks, one.forks = one.forks, ()
        one.tokens.append(0)
        for choice in () if one.hold else forks:
            child = Sequence(JOB, choice, [*one.tokens], one.prompt_len, max_tokens=one.max_tokens)
            self.alive.append(child)
            self.batch.fork(one, child)
        if one.hold:
            self.batch.stage(one)
        elif one.position >= one.max_tokens:
            self._end(one)

    def _end(self, one: Sequence) -> None:
        self.alive.remove(one)
        self.batch.remove(one)


Batching.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBatching = Batching.TestCase
