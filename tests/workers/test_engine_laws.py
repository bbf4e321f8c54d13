"""The engine under any order of events: every answer is the one that its job gives alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

if TYPE_CHECKING:
    from scheduler.messages import Output
    from workers.engine import Engine


def prompt(length: int) -> list[int]:
    """Each is the beginning of every longer one, so that their KV is shared; drafts are found."""
    return [7 * n % 11 for n in range(length)]


class Machine(RuleBasedStateMachine):
    """Two engines: `decode` takes over what `prefill` begins, and has work of its own.

    The test gives `make_engine`, `make_job` and `move_kv`.
    """

    known: ClassVar[dict[tuple[int, int], dict[int, list[int]]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.names = iter(range(1 << 20))
        self.jobs: dict[str, tuple[int, int]] = {}
        self.given: dict[str, dict[int, list[int]]] = {}
        self.reserved: dict[tuple[str, int], object] = {}  # granted: its sequence
        self.held: dict[tuple[str, int], object] = {}

    @initialize(blocks=st.integers(6, 12), budget=st.integers(1, 60))
    def start(self, blocks, budget):
        self.prefill: Engine = self.make_engine(blocks, max_step_tokens=budget)
        self.decode: Engine = self.make_engine(blocks, max_step_tokens=budget, max_sequences=4)

    @rule(length=st.integers(1, 60), choices=st.integers(1, 3))
    def add(self, length, choices):
        name = self.new(length, choices)
        self.decode.add(self.job(name, length, choices), prompt(length))

    @rule(length=st.integers(1, 60), choices=st.integers(1, 3))
    def split(self, length, choices):
        name = self.new(length, choices)
        self.decode.reserve(self.job(name, length, choices), prompt(length))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def push(self, data):
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.hand_over(key)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.jobs)))
        self.drop((name, 1))
        self.given.pop(name)

    @rule()
    def step_prefill(self):
        result = self.prefill.step()
        self.take(result.outputs)
        self.held.update(result.held)

    @rule()
    def step_decode(self):
        result = self.decode.step()
        self.take(result.outputs)
        for key, sequence in result.granted.items():
            self.reserved[key] = sequence
            length, choices = self.jobs[key[0]]
            self.prefill.add(self.job(key[0], length, choices), prompt(length), hold=True)

    @invariant()
    def sound(self):
        if hasattr(self, "decode"):
            self.prefill.check_integrity()
            self.decode.check_integrity()

    def teardown(self):
        for _ in range(10_000):
            if not self.jobs:
                break
            self.step_prefill()
            self.step_decode()
            for key in list(self.held):
                self.hand_over(key)
        assert self.jobs == {}, "a job never ends"
        if hasattr(self, "decode"):
            for engine in (self.prefill, self.decode):
                assert (engine.keys, engine.has_work) == ([], False)
                assert engine.batcher.pool.free == engine.batcher.pool.size

    def new(self, length: int, choices: int) -> str:
        name = f"job-{next(self.names)}"
        self.jobs[name], self.given[name] = (length, choices), {}
        return name

    def hand_over(self, key: tuple[str, int]) -> None:
        held, sequence = self.held.pop(key), self.reserved.pop(key)
        self.move_kv(held, self.prefill, sequence, self.decode)
        self.prefill.cancel(key)
        if held.firsts:
            assert self.decode.resume(key, held.firsts)
        else:
            self.decode.cancel(key)
        self.end_if_finished(key[0])

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            ids = self.given[output.id].setdefault(output.choice, [])
            assert output.position == len(ids)
            ids += output.ids
        for name in {output.id for output in outputs}:
            if (name, 1) not in self.reserved:
                self.end_if_finished(name)

    def end_if_finished(self, name: str) -> None:
        expected = self.alone(*self.jobs[name])
        if self.given[name] == expected:
            assert (name, 1) not in self.decode.keys
            del self.jobs[name], self.given[name]

    def drop(self, key: tuple[str, int]) -> None:
        self.prefill.cancel(key)
        self.decode.cancel(key)
        self.reserved.pop(key, None)
        self.held.pop(key, None)
        del self.jobs[key[0]]

    def alone(self, length: int, choices: int) -> dict[int, list[int]]:
        """What such a job gives when nobody else is there."""
        if (length, choices) not in self.known:
            engine = self.make_engine()
            engine.add(self.job("alone", length, choices), prompt(length))
            given: dict[int, list[int]] = {}
            while engine.has_work:
                for output in engine.step().outputs:
                    given.setdefault(output.choice, []).extend(output.ids)
            self.known[length, choices] = given
        return self.known[length, choices]

    def job(self, name: str, length: int, choices: int):
        return self.make_job(
            id=name, choices=tuple(range(choices)), ignore_eos=True, max_tokens=length % 23 + 1
        )


def test_no_order_of_events_changes_an_answer_or_loses_a_block(make_engine, make_job, move_kv):
    class Bound(Machine):
        pass

    Bound.make_engine = staticmethod(make_engine)
    Bound.make_job = staticmethod(make_job)
    Bound.move_kv = staticmethod(move_kv)
    Bound.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
    Bound.TestCase("runTest").runTest()
