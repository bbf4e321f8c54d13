"""Routes for the gateway: the core's placements, with this router's members, clock and chance."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.affinity import Chain, chain_of
from scheduler.placing import Placement, Placer
from scheduler.policies import POLICIES
from scheduler.pricing import Demand

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.lifecycle import Place
    from scheduler.messages import Output
    from scheduler.request import Job, TokenIds
    from scheduler.routing import Route
    from serving.members import Members


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """How this router chooses."""

    policy: str = "priced"  # a key of POLICIES
    local: bool = True  # without a prefill worker decode workers compute prompts; else: refuse


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
        self._members = members
        self._options = options
        self._clock = members.clock
        self._draw = draw
        self._placers: dict[str, Placer] = {}
        self._number = 0

    def place(self, place: Place) -> tuple[Placement, Route]:
        """A route for an attempt, and its load on the workers until `end`. Raises Unavailable."""
        job, placer = place.job, self._placer(place.job.model)
        self._number += 1
        chain = _chain(job)
        tokens = len(job.prompt.ids or ()) or placer.forecast.prompt_tokens(chain.size)
        tokens += len(job.emitted)
        output = placer.forecast.output_tokens(tokens)
        demand = Demand(
            prompt_tokens=tokens,
            output_tokens=min(output, job.limits.max_tokens or output),
            choices=len(job.choices),
            prefill_only=job.prefill_only,
            split=place.split,
            avoid=place.avoid,
            number=self._number,
        )
        placement = placer.place(demand, chain, self._clock())
        self._count(placement)
        return placement, self._members.route(placement.prefill.name, placement.decode.name)

    def output(self, job: Job, placement: Placement, output: Output) -> None:
        """An attempt gives tokens."""
        placer = self._placer(job.model)
        if placement.queued:
            fresh = not output.position and output.choice == job.choices[0]
            placer.first(placement, self._clock(), output.cached if fresh else None)
        else:
            placer.emitted(placement, len(output.ids))

    def handed_over(self, job: Job, placement: Placement) -> None:
        """The KV cache has arrived."""
        self._placer(job.model).arrived(placement)

    def end(self, job: Job, placement: Placement) -> None:
        """The attempt is over."""
        self._placer(job.model).end(placement, self._clock())

    def accepted(self, job: Job, prompt_ids: TokenIds) -> None:
        """A worker tokenised a prompt that was text."""
        if job.prompt.ids is None:
            self._placer(job.model).forecast.learn_prompt(_chain(job).size, len(prompt_ids))

    def finished(self, job: Job, tokens: int) -> None:
        """A choice came to its end after so many tokens."""
        if not job.prefill_only:
            forecast = self._placer(job.model).forecast
            forecast.learn_output(len(job.prompt.ids or ()), tokens)

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
