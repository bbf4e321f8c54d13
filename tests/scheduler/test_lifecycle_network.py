"""Whole requests over a simulated network that kills, stops, parts, delays, doubles and reorders.

The state machine, the suspicion and the words are the product's; workers and links are simulated,
in simulated time, from a seed. A worker's KV is the list of tokens that it was given, and a token
is a hash of them: what is lost, mixed up or given twice changes the answer.
"""

from __future__ import annotations

import heapq
import itertools
import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import pytest

from scheduler.errors import Unavailable
from scheduler.lifecycle import Deliver, End, Generation, Outcome, Phase, Place, Send, Started
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
)
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.routing import Route
from scheduler.suspicion import LOOK_S, Suspicion

WORKERS = ("a", "b", "c", "d")
ROUTER = "router"
STEP_S, BEAT_S, REJOIN_S, RETRY_S = 0.01, 0.25, 0.15, 0.1
FREE_S = 1.0  # what nobody waits for any more is free so soon
PROMPT = [1, 2, 3]


def token(kv: list[int], choice: int) -> int:
    return zlib.crc32(repr((kv, choice)).encode())


def length(choice: int) -> int:
    return 12 + 9 * choice


def answer(choice: int) -> list[int]:
    """The unbroken run."""
    ids: list[int] = []
    while len(ids) < length(choice):
        ids.append(token(PROMPT + ids, choice))
    return ids


class Network:
    """Simulated time, and who can reach whom. Everything random comes from the seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.stopped: dict[str, float] = {}  # until when a process does nothing
        self.parted: dict[frozenset[str], float] = {}  # until when two hear nothing of each other
        self._queue: list = []
        self._numbers = itertools.count()

    def at(self, delay: float, who: str, action) -> None:
        self.when(self.now + delay, who, action)

    def when(self, time: float, who: str, action) -> None:
        """`who` does this then, or when it wakes; what is due at one time stays in order."""
        heapq.heappush(self._queue, (time, next(self._numbers), who, action))

    def run(self, done) -> None:
        while self._queue and not done():
            self.now, _, who, action = heapq.heappop(self._queue)
            assert self.now < 120, "it does not end"
            if (wakes := self.stopped.get(who, 0)) > self.now:
                self.when(wakes, who, action)
            else:
                action()

    def delay(self) -> float:
        return self.random.uniform(0.0005, 0.02)


class Link:
    """One connection. Whoever `shuffles` its words may also say them twice."""

    def __init__(self, network: Network, *ends: str, shuffles: str = "") -> None:
        self.network, self.ends, self.shuffles = network, ends, shuffles
        self.closed_at: dict[str, float] = {}  # by whom: what arrives there later is lost
        self.hear = dict.fromkeys(ends)
        self.lost = dict.fromkeys(ends)
        self._last = dict.fromkeys(ends, 0.0)
        self._in_order: dict[str, deque] = {end: deque() for end in ends}

    def send(self, by: str, word) -> None:
        to = self.ends[self.ends[0] == by]
        for _ in range(1 + (by == self.shuffles and self.network.random.random() < 0.1)):
            self._carry(to, word, ordered=by != self.shuffles)

    def close(self, by: str) -> None:
        """The other end is told, after what was already on its way or a part of it."""
        to = self.ends[self.ends[0] == by]
        if by in self.closed_at:
            return
        self.closed_at[by] = self.network.now
        self._carry(to, None, ordered=self.network.random.random() < 0.5)

    def _carry(self, to: str, word, *, ordered: bool) -> None:
        network = self.network
        due = network.now + network.delay()
        if ordered:
            due = self._last[to] = max(due, self._last[to])
        line = self._in_order[to] if ordered else deque()
        line.append(word)

        def arrive() -> None:
            healed = network.parted.get(frozenset(self.ends), 0)
            if healed > network.now:
                network.when(healed, to, arrive)
                return
            word = line.popleft()
            if to not in self.closed_at:
                if word is None:
                    self.closed_at[to] = network.now
                    self.lost[to]()
                else:
                    self.hear[to](word)

        network.when(due, to, arrive)


@dataclass
class Held:
    """What a worker has of one job."""

    job: Job
    state: str  # prefilling, staged, reserved, decoding
    kv: list[int] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)  # by choice, what goes on here
    peer: Link | None = None


class Worker:
    """A worker process: obeys its router, hands over to others, steps while it has work."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.network = world, name, world.network
        self.held: dict[tuple[str, int], Held] = {}
        self.router: Link | None = None
        self.cancelled: set[tuple[str, int]] = set()  # perhaps before the words they are about
        self.alive = True
        self.do(0, self.join)

    def do(self, delay: float, action) -> None:
        self.network.at(delay, self.name, lambda: self.alive and action())

    def join(self) -> None:
        link = Link(self.network, self.name, ROUTER, shuffles=self.name)
        link.hear[self.name], link.lost[self.name] = self.obey, self.lost_router
        self.router = link
        self.world.router.join(self.name, link)
        self.beat(link)

    def beat(self, link: Link) -> None:
        if self.router is link:
            link.send(self.name, "load")
            self.do(BEAT_S, lambda: self.beat(link))

    def lost_router(self) -> None:
        self.router = None
        for key in list(self.held):
            self.free(key)
        self.do(REJOIN_S, self.join)

    def die(self) -> None:
        self.alive = False
        links = [held.peer for held in self.held.values()] + [self.router]
        for link in filter(None, links):
            link.close(self.name)

    def tell(self, word) -> None:
        if self.router:
            self.router.send(self.name, word)

    def free(self, key: tuple[str, int]) -> None:
        if (held := self.held.pop(key, None)) and held.peer:
            held.peer.close(self.name)

    def fail(self, key: tuple[str, int], kind: FailureKind) -> None:
        if key in self.held:
            self.free(key)
            self.tell(Failed(*key, kind, "why"))

    def obey(self, word) -> None:
        if isinstance(word, Cancel):
            self.cancelled.add((word.id, word.epoch))
            self.free((word.id, word.epoch))
            return
        job, key = word.job, (word.job.id, word.job.epoch)
        self.held[key] = held = Held(job, "prefilling", [*PROMPT, *job.emitted])
        self.tell(Accepted(*key, PROMPT))
        if word.handoff is None:
            self.do(STEP_S, lambda: self.prefilled(key))
            return
        peer = self.world.workers.get(word.handoff.name)
        if peer is None or self.world.parted(self.name, word.handoff.name):
            self.do(STEP_S, lambda: self.fail(key, FailureKind.HANDOFF))
            return
        held.peer = link = Link(self.network, self.name, peer.name)
        link.hear[self.name] = lambda word: self.answered(key, word)
        link.lost[self.name] = lambda: self.fail(key, FailureKind.HANDOFF)
        link.hear[peer.name] = lambda word: peer.offered(key, link, word)
        link.lost[peer.name] = lambda: peer.abandoned(key, link)
        link.send(self.name, ("reserve", job))

    def prefilled(self, key: tuple[str, int]) -> None:
        """The first token of each choice; they go on here, or where the KV goes."""
        if (held := self.held.get(key)) is None:
            return
        for choice in held.job.choices:
            held.answers[choice] = list(held.job.emitted)
            self.say(held, choice)
        self.end_if_done(key)
        if held.peer:
            held.state = "staged"
            held.peer.send(self.name, ("commit", held.kv, held.answers))
        else:
            held.state = "decoding"
            self.do(STEP_S, lambda: self.step(key))

    def say(self, held: Held, choice: int) -> None:
        ids = held.answers[choice]
        ids.append(token([*PROMPT, *ids], choice))
        last = len(ids) == length(choice)
        self.tell(
            Output(
                held.job.id,
                held.job.epoch,
                choice,
                len(ids) - 1,
                ids[-1:],
                finish=FinishReason.LENGTH if last else None,
            )
        )
        if last:
            del held.answers[choice]

    def end_if_done(self, key: tuple[str, int]) -> None:
        if key in self.held and not self.held[key].answers:
            self.free(key)

    def step(self, key: tuple[str, int]) -> None:
        if (held := self.held.get(key)) is None:
            return
        for choice in list(held.answers):
            self.say(held, choice)
        self.end_if_done(key)
        self.do(STEP_S, lambda: self.step(key))

    # the hand-over: first as the prefill worker, then as the decode worker

    def answered(self, key: tuple[str, int], word: str) -> None:
        if key not in self.held:
            return
        if word == "reserved":
            self.do(STEP_S, lambda: self.prefilled(key))
        else:
            self.free(key)
            self.tell(HandedOver(*key))

    def offered(self, key: tuple[str, int], link: Link, word) -> None:
        if word[0] == "reserve" and key not in self.cancelled:
            self.held[key] = Held(word[1], "reserved", peer=link)
            link.send(self.name, "reserved")
        elif word[0] == "commit" and key in self.held:
            held = self.held[key]
            held.state, held.kv, held.peer = "decoding", list(word[1]), None
            held.answers = {choice: list(ids) for choice, ids in word[2].items()}
            link.send(self.name, "committed")
            self.do(STEP_S, lambda: self.step(key))
        else:
            link.close(self.name)

    def abandoned(self, key: tuple[str, int], link: Link) -> None:
        if key in self.held and self.held[key].peer is link:
            self.free(key)


class Router:
    """The shell around the generations, as the gateway is: routes, sends, delivers."""

    def __init__(self, world: World) -> None:
        self.world, self.network = world, world.network
        self.members: dict[str, Link] = {}
        self.generations: dict[str, Generation] = {}
        self.delivered: dict[str, dict[int, list[int]]] = {}
        self.ends: dict[str, list[End]] = {}

    def begin(self, name: str, choices: int) -> None:
        numbers = tuple(range(choices))
        job = Job(name, 0, "m", Prompt(text="hi"), Sampling(seed=1), Limits(), 0.0, choices=numbers)
        self.generations[name] = Generation(job)
        self.delivered[name], self.ends[name] = {choice: [] for choice in numbers}, []
        self.obey(name, self.generations[name].start())

    def join(self, name: str, link: Link) -> None:
        heard = [True]
        suspicion = Suspicion()

        def look() -> None:
            if ROUTER in link.closed_at:
                return
            if suspicion.look(heard=heard.pop(), elapsed=LOOK_S):
                link.close(ROUTER)
                self.lost(name, link)
            heard[:] = [False]
            self.network.at(LOOK_S, ROUTER, look)

        def hear(word) -> None:
            heard[:] = [True]
            self.hear(name, word)

        link.hear[ROUTER], link.lost[ROUTER] = hear, lambda: self.lost(name, link)
        if old := self.members.get(name):
            old.close(ROUTER)
            self.lost(name, old)
        self.members[name] = link
        self.network.at(LOOK_S, ROUTER, look)

    def lost(self, name: str, link: Link) -> None:
        if self.members.get(name) is link:
            del self.members[name]
            for request, generation in self.generations.items():
                self.obey(request, generation.worker_lost(name))

    def hear(self, name: str, word) -> None:
        if word == "load":
            return
        generation = self.generations[word.id]
        if isinstance(word, Accepted):
            said = generation.accepted(word.epoch, word.prompt_ids)
        elif isinstance(word, Output):
            said = [Deliver(word)] if generation.follows(word) else generation.output(word)
        elif isinstance(word, HandedOver):
            said = generation.handed_over(word.epoch, name)
        else:
            said = generation.failed(name, word)
        self.obey(word.id, said)

    def obey(self, name: str, instructions) -> None:
        for instruction in instructions:
            if isinstance(instruction, Place):
                self.place(name, instruction)
            elif isinstance(instruction, Send):
                if link := self.members.get(instruction.worker):
                    link.send(ROUTER, instruction.message)
            elif isinstance(instruction, Deliver):
                output = instruction.output
                self.delivered[name][output.choice] += output.ids
            elif isinstance(instruction, End):
                self.ends[name].append(instruction)
            else:
                assert isinstance(instruction, Started)
        self.generations[name].check_integrity()

    def place(self, name: str, place: Place) -> None:
        """At random among who is here, rather not where it failed; later if nobody is here."""
        generation, draw = self.generations[name], self.network.random
        if place.job.epoch not in generation.attempts:
            return
        here = sorted(set(self.members) - place.avoid) or sorted(self.members)
        if not here:
            self.network.at(RETRY_S, ROUTER, lambda: self.place(name, place))
            return
        prefill, decode = draw.choice(here), draw.choice(here)
        split = place.split and prefill != decode
        route = Route(prefill, Peer(decode, Address("h", 1)) if split else None)
        self.obey(name, generation.routed(place.job.epoch, route))


class World:
    """Four workers, a router, requests, and misfortunes until `quiet_at`."""

    def __init__(self, seed: int, requests: int = 6, misfortunes: int = 12) -> None:
        self.network = Network(seed)
        self.router = Router(self)
        self.workers = {name: Worker(self, name) for name in WORKERS}
        self.misfortunes: list[str] = []
        self.orphans: dict[tuple[str, tuple[str, int]], float] = {}
        self.cancelled: set[str] = set()
        draw = self.network.random
        for number in range(requests):
            start, choices = draw.uniform(0.05, 1.5), draw.randint(1, 3)
            self.network.at(
                start, ROUTER, lambda name=f"r{number}", n=choices: self.router.begin(name, n)
            )
        self.expected = requests
        kinds = (self.kill, self.stop, self.part, self.err, self.leave)
        for _ in range(misfortunes):
            kind = draw.choice(kinds)
            self.network.at(draw.uniform(0.1, 3.0), "fate", kind)
        self.network.at(0.05, "fate", self.audit)

    def parted(self, *ends: str) -> bool:
        return self.network.parted.get(frozenset(ends), 0) > self.network.now

    def kill(self) -> None:
        name = self.network.random.choice(WORKERS)
        self.misfortunes.append(f"kill {name}")
        self.workers[name].die()
        self.network.stopped.pop(name, None)
        self.workers[name] = Worker(self, name)

    def stop(self) -> None:
        name, seconds = self.network.random.choice(WORKERS), self.network.random.uniform(0.1, 4)
        self.misfortunes.append(f"stop {name}")
        until = self.network.now + seconds
        self.network.stopped[name] = max(until, self.network.stopped.get(name, 0))

    def part(self) -> None:
        ends = frozenset(self.network.random.sample([*WORKERS, ROUTER], 2))
        self.misfortunes.append(f"part {sorted(ends)}")
        until = self.network.now + self.network.random.uniform(0.1, 4)
        self.network.parted[ends] = max(until, self.network.parted.get(ends, 0))

    def err(self) -> None:
        worker = self.workers[self.network.random.choice(WORKERS)]
        if worker.held and self.network.stopped.get(worker.name, 0) < self.network.now:
            self.misfortunes.append(f"err {worker.name}")
            worker.fail(self.network.random.choice(sorted(worker.held)), FailureKind.INTERNAL)

    def leave(self) -> None:
        if self.router.generations and self.network.random.random() < 0.5:
            name = self.network.random.choice(sorted(self.router.generations))
            self.misfortunes.append(f"leave {name}")
            self.router.obey(name, self.router.generations[name].cancel())

    def audit(self) -> None:
        """At any time: one worker goes on with an attempt, and nothing that is over lies about."""
        decoding = [
            key
            for worker in self.workers.values()
            for key, held in worker.held.items()
            if held.state == "decoding"
        ]
        assert len(decoding) == len(set(decoding)), "two workers go on with one attempt"
        seen = {}
        for name, worker in self.workers.items():
            reachable = worker.router and not self.parted(name, ROUTER)
            if reachable and self.network.stopped.get(name, 0) < self.network.now:
                for id_, epoch in worker.held:
                    if epoch not in self.router.generations[id_].attempts:
                        seen[name, (id_, epoch)] = self.network.now
        self.orphans = {key: self.orphans.get(key, now) for key, now in seen.items()}
        for key, since in self.orphans.items():
            assert self.network.now - since <= FREE_S, f"{key} is held for nobody"
        self.network.at(0.05, "fate", self.audit)

    def over(self) -> bool:
        ended = len(self.router.generations) == self.expected and all(
            generation.ended for generation in self.router.generations.values()
        )
        return ended and not any(worker.held for worker in self.workers.values())


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_whatever_happens_each_request_ends_once_with_the_unbroken_answer(first):
    for seed in range(first, first + 50):
        world = World(seed)
        try:
            world.network.run(world.over)
            for name, generation in world.router.generations.items():
                (end,) = world.router.ends[name]
                refused = generation.outcome is Outcome.REFUSED
                assert not refused or isinstance(end.error, Unavailable)
                for choice, ids in world.router.delivered[name].items():
                    whole = answer(choice)
                    assert ids == whole[: len(ids)]
                    assert ids == whole or generation.outcome is not Outcome.FINISHED
                assert not refused, "refused"
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}; {world.misfortunes}") from error


def test_the_network_is_as_hostile_as_it_says():
    """Every phase of an attempt is hit, and requests are replayed: the laws are not empty."""
    hit: set[Phase] = set()
    replays = 0
    for seed in range(40):
        world = World(seed)
        lost = world.router.lost

        def spy(name, link, lost=lost, world=world):
            for generation in world.router.generations.values():
                hit.update(a.phase for a in generation.attempts.values() if name in a.workers)
            lost(name, link)

        world.router.lost = spy
        world.network.run(world.over)
        replays += sum(generation._epoch > 1 for generation in world.router.generations.values())
    assert hit == {Phase.PREFILLING, Phase.STAGED, Phase.DECODING}
    assert replays > 40
