"""What routing knows of the workers of one model: what their steps cost, and what they hold.

The router counts what it sends, so that a choice never waits for a report; reports correct what a
step costs there. Sums are kept as work (tokens), and become seconds at the newest cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scheduler import predict
from scheduler.cost import STEP_TOKENS
from scheduler.messages import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from scheduler.cost import CostModel
    from scheduler.links import Link
    from scheduler.messages import Address, Load
    from scheduler.shares import Allowance

Rank = tuple[int, int]  # (priority, share): a lower one is served first

SHORTLIST = 32  # above so many workers a choice looks at a sample
SAMPLE = 16  # workers, at least two of each role and speed
LATE_REPORT_S = 1.0  # after so long without one a worker is believed to stand still


class Queued(NamedTuple):
    """Prompts of one rank that were sent to a worker and are not through it."""

    jobs: int = 0
    tokens: int = 0  # not cached
    attended: int = 0  # see StepShape.prompt_context


@dataclass(eq=False, slots=True)
class Worker:
    """One worker, as routing sees it. Times are in seconds of the router's clock."""

    name: str
    role: Role
    address: Address
    cost: CostModel
    kv_tokens: int = 1 << 62  # that its KV cache holds
    step_tokens: int = STEP_TOKENS  # most in one step
    places: int = 1 << 30  # sequences that run at once
    overlaps: bool = False  # its KV cache moves while the prompt is still computed
    allowance: Allowance | None = None  # of all of its kind, by the plan; None: there is no plan
    draining: bool = False
    others_running: int = 0  # sequences that other routers have here, by its last report
    others_queued: int = 0  # tokens of their prompts that are not computed
    sound: Callable[[float], bool] = lambda now: True  # neither failing nor suspect at this time
    heard: float = 0.0  # when its last report came
    standing: float = 0.0  # how long the step that it is in had taken by then
    queued: dict[Rank, Queued] = field(default_factory=dict)
    begun: float = 0.0  # when the prompt at the head of its queue began, as far as we know
    outstanding: int = 0  # choices that it computes or will compute, whichever phase
    running: int = 0  # choices that it decodes, or will
    context: float = 0.0  # tokens of these, half of their predicted output included
    held: float = 0.0  # tokens of KV cache that they will need
    moving: float = 0.0  # bytes of KV cache that prefills have left behind, to or from it
    links: dict[str, Link] = field(default_factory=dict)  # to others, by name
    # Of the running ones, those whose prompt is computed, or will be before one that comes now.
    decoding: int = 0
    outputs: float = 0.0  # tokens that these will give, as predicted
    left: float = 0.0  # tokens to come of those whose prompt is computed
    # Of those who decode, or will before it, the choices that have a limit on TPOT: how many, the
    # seconds that their limits allow in all, and the tokens that they are still to give; and how
    # many of these have begun, and when (summed).
    limited: int = 0
    allowed: float = 0.0
    limited_left: float = 0.0
    timed: int = 0
    started: float = 0.0
    _order: tuple[float, str] = (0.0, "")
    _mixed: float = 0.0  # share of its recent time that went to prompts
    _mixed_at: float = 0.0

    def __post_init__(self) -> None:
        self._order = (self.token_s, self.name)

    def report(self, load: Load, now: float) -> None:
        """A heartbeat."""
        self.heard, self.standing = now, load.standing_s
        self.others_running, self.others_queued = load.others_running, load.others_queued
        self.cost = load.cost or self.cost

    def may_hand_to(self, other: Worker) -> bool:
        """Mixed workers hand over from the faster one to the slower one, as they joined.

        Blocks are reserved at the receiver before the sender takes its own. If two could do that to
        each other, each could wait for blocks that are reserved for the other's requests for ever.
        """
        both = self.role is other.role is Role.MIXED
        return self is not other and (not both or self._order < other._order)

    def link_bytes_s(self, other: Worker, now: float) -> float:
        """Bytes of KV cache per second from here to there."""
        assumed = min(self.cost.link_bytes_s, other.cost.link_bytes_s)
        link = self.links.get(other.name)
        return link.rate(assumed, max(self.moving, other.moving), now) if link else assumed

    @property
    def token_s(self) -> float:
        """Seconds of a prompt token in a full step, without its attention."""
        return predict.full_token_s(self.cost, self.step_tokens)

    @property
    def idle(self) -> bool:
        """Nothing that was sent here is still counted."""
        return not (self.queued or self.outstanding or self.running or self.limited)

    def prompt_s(self, tokens: int, attended: int) -> float:
        """Seconds that so many prompt tokens take, in pieces, beside the sequences that run."""
        running = self.running + self.others_running
        each = predict.token_s(self.cost, running, self.context, self.step_tokens)
        return tokens * each + attended * self.cost.attend

    def wait_s(self, rank: Rank, now: float) -> float:
        """Seconds until a prompt of this rank that is sent now begins."""
        jobs = tokens = attended = 0
        for other, work in self.queued.items():
            if other <= rank:
                jobs += work.jobs
                tokens += work.tokens
                attended += work.attended
        wait = self.stalled_s(now)
        if self.others_queued:
            wait += self.prompt_s(self.others_queued, 0)
        if jobs:
            wait += predict.queue_s(self.prompt_s(tokens, attended), jobs, now - self.begun)
        return wait

    def stalled_s(self, now: float) -> float:
        """How long it has been standing still: it may for as long again."""
        if not self.heard:
            return 0.0
        silent = now - self.heard
        return self.standing + (silent if silent > LATE_REPORT_S else 0.0)

    def mixed(self, now: float) -> float:
        """The share of its time that goes to prompts."""
        return predict.mixed(self._mixed, now - self._mixed_at)

    def slowing(self, stall: float, now: float) -> float:
        """By what factor so many more seconds of prompts make its steps longer."""
        return predict.slowing(self.mixed(now), stall)

    def tpot_s(self, more: int, context: float, now: float) -> float:
        """Seconds between two tokens with so many further sequences."""
        running = self.running + self.others_running
        step = self.cost.decode_step_s(running + more, self.context + context)
        return step / (1 - self.mixed(now))

    @property
    def decode_s(self) -> float:
        """Seconds of a step of those who run."""
        return self.cost.decode_step_s(self.running + self.others_running, self.context)

    @property
    def step_s(self) -> float:
        """Seconds of the step that it is in: with a piece of a prompt, if one waits."""
        seconds = self.decode_s if self.running or self.others_running else 0.0
        if self.queued:
            tokens = sum(work.tokens for work in self.queued.values())
            seconds += self.cost.token * min(tokens, self.step_tokens)
        return seconds

    def needed_s(self, tpot: float, now: float) -> float:
        """Of the seconds that limits allow in all: those that are gone, and those to come.

        The prompts in its queue hold up whoever has begun, and of the others those ahead of them:
        half, on the mean.
        """
        needed = now * self.timed - self.started + self.limited_left * tpot
        if self.queued:
            token, attend = self.cost.token, self.cost.attend
            stall = sum([w.tokens * token + w.attended * attend for w in self.queued.values()])
            needed += stall * (self.timed + self.limited) / 2
        return needed

    def room_s(self, tokens: float, choices: int, tpot: float) -> float:
        """Seconds until it has blocks for so many tokens more, and places for the choices.

        What runs gives back its share when it ends.
        """
        if not self.running:
            return 0.0
        crowding = predict.crowding(
            self.held, tokens, self.kv_tokens, self.running, choices, self.places
        )
        return crowding * self.turnover_s(tpot) if crowding else 0.0

    def turnover_s(self, tpot: float) -> float:
        """Seconds until as many choices have ended as decode now."""
        return predict.turnover_s(self.left, self.outputs, self.decoding, tpot)

    def settle(self) -> None:
        """When nothing runs the sums are 0: what rounding left in them is not work."""
        if not self.running:
            self.context = self.held = self.left = self.outputs = 0.0
        if not self.limited:
            self.allowed = self.started = self.limited_left = 0.0

    def enqueue(self, rank: Rank, tokens: int, attended: int, now: float) -> None:
        """A prompt was sent here."""
        if not self.queued:
            self.begun = now
        jobs, before, pairs = self.queued.get(rank, Queued())
        self.queued[rank] = Queued(jobs + 1, before + tokens, pairs + attended)
        share = self.cost.token * tokens + self.cost.attend * attended
        self._mixed = self.mixed(now) + share / predict.MIXING_S
        self._mixed_at = now

    def dequeue(self, rank: Rank, tokens: int, attended: int, now: float) -> None:
        """It is computed, or will not be."""
        jobs, before, pairs = self.queued[rank]
        if jobs == 1:
            del self.queued[rank]
        else:
            self.queued[rank] = Queued(jobs - 1, before - tokens, pairs - attended)
        self.begun = now


class Fleet:
    """The workers of one model: a choice looks at few of them, however many they are."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._pools: dict[tuple[Role, int], list[Worker]] = {}  # role, octave of speed

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def add(self, worker: Worker) -> None:
        """Takes the place of one of the same name."""
        self.remove(worker.name)
        self._workers[worker.name] = worker
        self._pools.setdefault(_kind(worker), []).append(worker)

    def drain(self, name: str) -> None:
        """Choose it no more."""
        if worker := self._workers.get(name):
            worker.draining = True

    def remove(self, name: str) -> None:
        if worker := self._workers.pop(name, None):
            for pool in self._pools.values():
                if worker in pool:
                    pool.remove(worker)
            for other in self:
                other.links.pop(name, None)

    def candidates(self, now: float, draw: Callable[[], float]) -> list[Worker]:
        """All workers that take requests; above SHORTLIST a sample of every role and speed.

        Those that are unsound only if nobody else is left.

        `draw` gives numbers in [0, 1).
        """
        found = [worker for worker in self._sample(draw) if not worker.draining]
        return [worker for worker in found if worker.sound(now)] or found

    def _sample(self, draw: Callable[[], float]) -> Iterable[Worker]:
        if len(self._workers) <= SHORTLIST:
            return self._workers.values()
        each = max(2, SAMPLE // len(self._pools))
        found: dict[Worker, None] = {}
        for pool in self._pools.values():
            if len(pool) <= each:
                found.update(dict.fromkeys(pool))
            else:
                found.update((pool[int(draw() * len(pool))], None) for _ in range(each))
        return found


def _kind(worker: Worker) -> tuple[Role, int]:
    return worker.role, round(math.log2(max(worker.token_s, 1e-12)))
