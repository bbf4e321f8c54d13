"""One prompt's life in a hostile world: whatever happens, the client gets each token once.

Workers are simulated: each says, for a Submit, what a real one would. Their words travel in order
on each worker's own link, but the links are unequally fast; words are said twice; workers die, come
back, fail jobs, and lose hand-overs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.errors import Unavailable
from scheduler.lifecycle import Deliver, End, Generation, Place, Send, Started
from scheduler.messages import (
    Accepted,
    Address,
    Cancel,
    Failed,
    FailureKind,
    FinishReason,
    HandedOver,
    Output,
    Peer,
    Submit,
)
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.routing import Route

NAMES = ("a", "b", "c")
IDS = [1, 2, 3]


def answer(choice: int) -> list[int]:
    """The unbroken run: choices end at different lengths, one with its first token."""
    return [100 * choice + position for position in range(1 + 3 * choice)]


@dataclass
class Worker:
    """Its link to the router, and what it holds: job epochs that were not ended by anything."""

    link: deque = field(default_factory=deque)
    holds: set[int] = field(default_factory=set)


def outputs(job: Job, choice: int, start: int, end: int) -> list[Output]:
    ids = answer(choice)
    return [
        Output(
            job.id,
            job.epoch,
            choice,
            position,
            [ids[position]],
            chr(97 + position),
            finish=FinishReason.STOP if position == len(ids) - 1 else None,
        )
        for position in range(start, min(end, len(ids)))
    ]


class World(RuleBasedStateMachine):
    """A generation, its workers, and the shell that carries out its instructions."""

    def __init__(self) -> None:
        super().__init__()
        self.workers = {name: Worker() for name in NAMES}
        self.places: list[Place] = []
        self.started = 0
        self.ends: list[End] = []
        self.delivered: dict[int, list[Output]] = {}

    @initialize(choices=st.integers(1, 3))
    def start(self, choices):
        job = Job(
            "r",
            0,
            "m",
            Prompt(text="hi"),
            Sampling(seed=1),
            Limits(),
            0.0,
            choices=tuple(range(choices)),
        )
        self.delivered = {choice: [] for choice in job.choices}
        self.generation = Generation(job)
        self.obey(self.generation.start())

    @precondition(lambda self: self.places)
    @rule(names=st.permutations(NAMES), split=st.booleans())
    def route(self, names, split):
        place = self.places.pop(0)
        handoff = Peer(names[1], Address("h", 1)) if split and place.split else None
        self.obey(self.generation.routed(place.job.epoch, Route(names[0], handoff)))

    @precondition(lambda self: any(w.link for w in self.workers.values()))
    @rule(data=st.data(), twice=st.booleans())
    def hear(self, data, twice):
        """The next word on one link reaches the router, perhaps twice."""
        name = data.draw(st.sampled_from([n for n, w in self.workers.items() if w.link]))
        message = self.workers[name].link.popleft()
        for _ in range(1 + twice):
            self.obey(self.tell(name, message))

    @rule(name=st.sampled_from(NAMES))
    def die(self, name):
        """The worker is gone with all that it had still to say; another takes its name."""
        self.workers[name] = Worker()
        self.obey(self.generation.worker_lost(name))

    @precondition(lambda self: any(w.holds for w in self.workers.values()))
    @rule(data=st.data(), kind=st.sampled_from([FailureKind.INTERNAL, FailureKind.HANDOFF]))
    def give_up(self, data, kind):
        name = data.draw(st.sampled_from([n for n, w in self.workers.items() if w.holds]))
        worker = self.workers[name]
        epoch = data.draw(st.sampled_from(sorted(worker.holds)))
        worker.holds.discard(epoch)
        worker.link.append(Failed("r", epoch, kind, "why"))

    @precondition(lambda self: not self.ends)
    @rule(leave=st.integers(0, 9))
    def client_leaves(self, leave):
        if leave == 0:
            self.obey(self.generation.cancel())

    @invariant()
    def the_client_has_a_beginning_of_the_unbroken_answer(self):
        for choice, given in self.delivered.items():
            ids = [token for output in given for token in output.ids]
            assert ids == answer(choice)[: len(ids)]
            assert [output.position for output in given] == list(range(len(ids)))
        if hasattr(self, "generation"):
            self.generation.check_integrity()

    def teardown(self):
        """In peace, it comes to its end; then nobody holds anything of it."""
        while self.places or any(w.link for w in self.workers.values()):
            if self.places:
                place = self.places.pop(0)
                self.obey(self.generation.routed(place.job.epoch, Route("a")))
            for name, worker in self.workers.items():
                if worker.link:
                    self.obey(self.tell(name, worker.link.popleft()))
        if not hasattr(self, "generation"):
            return
        assert len(self.ends) == 1
        assert {name: w.holds for name, w in self.workers.items() if w.holds} == {}
        if self.ends[0].error:
            assert isinstance(self.ends[0].error, Unavailable)
        elif all(ledger.finished for ledger in self.generation.ledgers.values()):
            for choice, given in self.delivered.items():
                assert [o.ids[0] for o in given] == answer(choice)
                assert "".join(o.text for o in given) == "abcdefghijkl"[: len(given)]

    def obey(self, instructions) -> None:
        for instruction in instructions:
            assert not self.ends, "something follows the end"
            match instruction:
                case Place():
                    self.places.append(instruction)
                case Started():
                    self.started += 1
                    assert self.started == 1
                case Deliver(output=output):
                    assert self.started, "a token before the start"
                    self.delivered[output.choice].append(output)
                case Send(worker=name, message=Submit(job=job, handoff=peer)):
                    self.serve(name, job, peer)
                case Send(worker=name, message=Cancel(epoch=epoch)):
                    self.workers[name].holds.discard(epoch)
                case End():
                    self.ends.append(instruction)

    def serve(self, name: str, job: Job, peer: Peer | None) -> None:
        """Everything that the worker, and the one it hands over to, will say of this job."""
        link = self.workers[name].link
        link.append(Accepted(job.id, job.epoch, IDS))
        begun = len(job.emitted)
        first = begun + 1 if peer else 1 << 30
        for choice in job.choices:
            link.extend(outputs(job, choice, begun, first))
        self.workers[name].holds.add(job.epoch)
        if peer:
            link.append(HandedOver(job.id, job.epoch))
            decode = self.workers[peer.name]
            decode.holds.add(job.epoch)
            for choice in job.choices:
                decode.link.extend(outputs(job, choice, first, 1 << 30))

    def tell(self, name: str, message):
        generation, holds = self.generation, self.workers[name].holds
        match message:
            case Accepted(epoch=epoch, prompt_ids=ids):
                return generation.accepted(epoch, ids)
            case HandedOver(epoch=epoch):
                holds.discard(epoch)
                return generation.handed_over(epoch, name)
            case Failed():
                return generation.failed(name, message)
            case Output(epoch=epoch):
                if generation.follows(message):
                    return [Deliver(message)]
                before = set(generation.attempts)
                instructions = generation.output(message)
                for done in before - set(generation.attempts):
                    self.finish(done)
                return instructions

    def finish(self, epoch: int) -> None:
        """All choices have their last token: the workers that gave them hold nothing any more."""
        for worker in self.workers.values():
            worker.holds.discard(epoch)


World.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestWorld = World.TestCase
