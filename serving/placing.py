"""Routes for the gateway: the core's placements, with this router's members, clock and chance."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.affinity import Chain, chain_of
from scheduler.fairness import FairShare
from scheduler.placing import Placement, Placer
from scheduler.policies import POLICIES
from scheduler.pricing import Demand
from scheduler.request import Turn
from scheduler.routing import MAX_WAIT_S
from serving.beliefs import Beliefs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from scheduler.lifecycle import Place
    from scheduler.messages import HandedOver, Output
    from scheduler.request import Job
    from scheduler.routing import Route
    from serving.members import Members
    from serving.wish import Wish


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """How this router chooses. Limits of models are for requests that bring none of their own."""

    policy: str = "priced"  # a key of POLICIES
    local: bool = True  # without a prefill worker decode workers compute prompts; else: refuse
    ttft_s: Mapping[str, float] = field(default_factory=dict)  # by model; "": of every other one
    tpot_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Standing:
    """What routing remembers of one generation, over all its attempts."""

    chain: Chain
    ttft_s: float  # limits; inf: none
    tpot_s: float
    priority: int
    key: str
    arrived: float
    placer: Placer
    fair: FairShare
    share: int = 0  # how far its key is ahead of the others
    first: float | None = None  # when its first token came
    prompt_tokens: int = 0  # once they are known


class Placing:
    """One placer a model. Counts what the metrics show."""

    def __init__(
        self,
        members: Members,
        options: RoutingOptions,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.degraded: Counter[str] = Counter()  # by reason
        self.decisions: Counter[str] = Counter()  # whole or split
        self.violations: Counter[str] = Counter()  # of limits, ttft or tpot
        self.beliefs = Beliefs()
        self._shares: dict[str, FairShare] = {}
        self._members = members
        self._options = options
        self._clock = members.clock
        self._draw = draw
        self._placers: dict[str, Placer] = {}
        self._number = 0

    def enter(self, job: Job, wish: Wish) -> Standing:
        """A request comes; it `leave`s once."""
        model, options, asked = job.model, self._options, wish.limits
        fair = self._shares.setdefault(model, FairShare())
        standing = Standing(
            chain=_chain(job),
            ttft_s=asked.ttft_s or _default(options.ttft_s, model),
            tpot_s=asked.tpot_s or _default(options.tpot_s, model),
            priority=wish.priority,
            key=wish.key,
            arrived=self._clock(),
            placer=self._placer(model),
            fair=fair,
            prompt_tokens=len(job.prompt.ids or ()),
        )
        standing.share = fair.enter(standing.key, _prompt_tokens(standing))
        return standing

    def leave(self, job: Job, standing: Standing, finished: Iterable[int]) -> None:
        """It has ended; its choices that were finished have so many tokens each."""
        standing.fair.leave(standing.key)
        if job.prefill_only:
            return
        forecast, now = standing.placer.forecast, self._clock()
        for tokens in finished:
            forecast.learn_end(standing.prompt_tokens, tokens)
            late = standing.first is not None and tokens > 1
            if late and (now - (standing.first or 0)) / (tokens - 1) > standing.tpot_s:
                self.violations["tpot"] += 1

    def place(self, place: Place, standing: Standing) -> tuple[Placement, Route]:
        """A route for an attempt, and its load on the workers until `end`. Raises Unavailable."""
        job, placer, now = place.job, standing.placer, self._clock()
        self._number += 1
        tokens = _prompt_tokens(standing) + len(job.emitted)
        output = placer.forecast.output_tokens(tokens)
        # A replay's client has its first token already, and is not sent away.
        again = standing.first is not None
        left = 0.0 if again else standing.ttft_s - (now - standing.arrived)
        demand = Demand(
            prompt_tokens=tokens,
            output_tokens=min(output, job.limits.max_tokens or output),
            choices=len(job.choices),
            ttft_s=math.inf if again else max(left, 1e-3),
            tpot_s=math.inf if again else standing.tpot_s,
            rank=(standing.priority, standing.share),
            prefill_only=job.prefill_only,
            split=place.split,
            avoid=place.avoid,
            number=self._number,
        )
        placement = placer.place(demand, standing.chain, now)
        self._count(placement)
        route = self._members.route(placement.prefill.name, placement.decode.name)
        if left == math.inf:  # due in the order of arrival, wherever it is replayed
            left = MAX_WAIT_S - (now - standing.arrived)
        return placement, route._replace(turn=Turn(standing.priority, standing.share, left))

    def output(self, job: Job, standing: Standing, placement: Placement, output: Output) -> None:
        """An attempt gives tokens."""
        tokens = len(output.ids)
        standing.fair.serve(standing.key, tokens)
        before, forecast = output.position, standing.placer.forecast
        forecast.learn_growth(standing.prompt_tokens, before, before + tokens)
        if not placement.queued:
            standing.placer.emitted(placement, tokens)
            return
        now = self._clock()
        if standing.first is None:
            standing.first = now
            self.violations["ttft"] += now - standing.arrived > standing.ttft_s
        self.beliefs.first(placement, now)
        fresh = not output.position and output.choice == job.choices[0]
        standing.placer.first(placement, now, output.cached if fresh else None)

    def handed_over(self, standing: Standing, placement: Placement, said: HandedOver) -> None:
        """The KV cache has arrived."""
        standing.placer.arrived(placement, self._clock(), said.kv_bytes, said.link_s)

    def end(self, standing: Standing, placement: Placement) -> None:
        """The attempt is over."""
        now = self._clock()
        self.beliefs.end(placement, now)
        standing.placer.end(placement, now)
        self._members.ended(placement.prefill.name, placement.decode.name)

    def accepted(self, standing: Standing, tokens: int) -> None:
        """A worker tokenised the prompt."""
        if not standing.prompt_tokens:
            standing.prompt_tokens = tokens
            standing.placer.forecast.learn_prompt(standing.chain.size, tokens)

    def _count(self, placement: Placement) -> None:
        if placement.chosen.degraded:
            self.degraded[placement.chosen.degraded] += 1
        elif not placement.demand.split:
            self.degraded["handoff_failed"] += 1
        self.decisions["split" if placement.split else "whole"] += 1

    def _placer(self, model: str) -> Placer:
        if model not in self._placers:
            self._placers[model] = Placer(
                self._members.fleet(model),
                self._draw,
                POLICIES[self._options.policy],
                self._options.local,
            )
        return self._placers[model]


def _prompt_tokens(standing: Standing) -> int:
    """Known, or estimated from its characters."""
    known = standing.prompt_tokens
    return known or standing.placer.forecast.prompt_tokens(standing.chain.size)


def _chain(job: Job) -> Chain:
    """The prompt in pieces; one that is token ids already is remembered as those."""
    prompt = job.prompt
    if prompt.ids is not None:
        return Chain()
    if prompt.text is not None:
        return chain_of((prompt.text,))
    texts = [prompt.tools or ""]
    for message in prompt.messages or ():
        texts += (message.role, message.content)
    return chain_of(texts)


def _default(limits: Mapping[str, float], model: str) -> float:
    return limits.get(model, limits.get("", math.inf))
