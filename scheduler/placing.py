"""One model's placements: a route for each attempt, and the load that it brings, until it ends.

    place ──► first (prompt computed) ──► emitted … ──► end
                └─► arrived (its KV cache is where it decodes)

The live router and the simulator drive the same object: events in, with the time, and a route out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from scheduler.affinity import Chain, Prefixes
from scheduler.forecast import Forecast
from scheduler.links import Link
from scheduler.messages import Role
from scheduler.routing import choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.fleet import Fleet, Worker
    from scheduler.pricing import Demand
    from scheduler.routing import Chosen, Policy


@dataclass(eq=False, slots=True)
class Placement:
    """What one attempt adds to its workers."""

    demand: Demand
    chosen: Chosen
    chain: Chain
    tokens: int  # of the prompt, to be computed
    attended: int  # see StepShape.prompt_context
    outputs: float  # tokens that all its choices will give after their first, as predicted
    left: float  # of these, the ones that are still to come
    context: float  # on the decode worker
    held: float  # tokens of KV cache there
    at: float  # when it was placed
    given: int = 0  # tokens after its first ones
    bytes: float = 0.0  # on the link
    link: Link | None = None  # that they are on: its prompt is computed and its KV cache not there
    queued: bool = True  # its prompt is not computed
    began: float = 0.0  # when its prompt was computed
    limit: float = 0.0  # seconds that its output may take, if there is a limit
    ended: bool = False

    @property
    def prefill(self) -> Worker:
        return self.chosen.prefill

    @property
    def decode(self) -> Worker:
        return self.chosen.decode

    @property
    def split(self) -> bool:
        return self.prefill is not self.decode


@dataclass(slots=True)
class Placer:
    """Chooses and accounts. `draw` gives numbers in [0, 1): chance comes from outside."""

    fleet: Fleet
    draw: Callable[[], float]
    policy: Policy
    local: bool = True  # without a prefill worker decode workers compute prompts
    prefixes: Prefixes = field(default_factory=Prefixes)
    forecast: Forecast = field(default_factory=Forecast)

    def place(self, demand: Demand, chain: Chain, now: float) -> Placement:
        """Raises Unavailable."""
        if chain.keys:
            share = demand.prompt_tokens / chain.size
            found = self.prefixes.find(chain)
            known = {worker: int(units * share) for worker, units in found.items()}
            demand = replace(demand, cached=known)
        chosen = choose(demand, self.fleet, now, self.draw, self.policy, local=self.local)
        placement = _placement(demand, chosen, chain, now)
        self._load(placement, now)
        return placement

    def first(self, placement: Placement, now: float, cached: int | None = None) -> None:
        """The prompt is computed; so many of its tokens were `cached`, where that is known."""
        if placement.ended or not placement.queued:
            return
        demand, decode = placement.demand, placement.decode
        placement.queued = False
        placement.began = now
        placement.prefill.dequeue(demand.rank, placement.tokens, placement.attended, now)
        if placement.bytes:
            placement.link = placement.prefill.links.setdefault(decode.name, Link())
            placement.link.begin(now)
            placement.prefill.moving += placement.bytes
            decode.moving += placement.bytes
        decode.left += placement.left
        if placement.split:
            self._decodes(placement)
        if placement.limit:
            decode.timed += demand.choices
            decode.started += now * demand.choices
        if cached is not None and placement.chain.keys:
            units = cached * placement.chain.size / demand.prompt_tokens
            self.prefixes.forget(placement.chain, placement.prefill, math.ceil(units))

    def emitted(self, placement: Placement, tokens: int) -> None:
        """A choice has so many tokens more after its first."""
        if placement.queued or placement.ended:
            return
        placement.given += tokens
        gone = tokens if tokens < placement.left else placement.left
        decode = placement.chosen.decode
        placement.left -= gone
        decode.left -= gone
        if placement.limit:
            decode.limited_left -= gone
            if tokens > gone:
                # Tokens beyond those predicted are allowed their time too: else whoever is longer
                # than was thought would look late, and keep others out.
                more = placement.demand.tpot_s * (tokens - gone)
                placement.limit += more
                decode.allowed += more

    def arrived(
        self, placement: Placement, now: float, size: float = 0.0, seconds: float = 0.0
    ) -> None:
        """The KV cache is on the decode worker: `size` bytes, which took so long on the link."""
        if placement.link:
            placement.link.learn(size, seconds, now)
        self._off_link(placement, now)

    def _off_link(self, placement: Placement, now: float) -> None:
        if placement.link:
            placement.link.end(now)
            placement.link = None
            placement.prefill.moving -= placement.bytes
            placement.decode.moving -= placement.bytes

    def end(self, placement: Placement, now: float) -> None:
        """Take off its workers what it brought. Idempotent."""
        if placement.ended:
            return
        placement.ended = True
        self._off_link(placement, now)
        demand, decode = placement.demand, placement.decode
        if placement.queued:
            placement.prefill.dequeue(demand.rank, placement.tokens, placement.attended, now)
        else:
            decode.left -= placement.left
        if not (placement.queued and placement.split):
            decode.decoding -= demand.choices
            decode.outputs -= placement.outputs
        if placement.limit:
            decode.limited -= demand.choices
            decode.allowed -= placement.limit
            decode.limited_left -= placement.left
            if not placement.queued:
                decode.timed -= demand.choices
                decode.started -= placement.began * demand.choices
        for worker in {placement.prefill, decode}:
            worker.outstanding -= demand.choices
        decode.running -= demand.choices
        decode.context -= placement.context
        decode.held -= placement.held
        decode.settle()

    def _load(self, placement: Placement, now: float) -> None:
        demand, prefill, decode = placement.demand, placement.prefill, placement.decode
        prefill.enqueue(demand.rank, placement.tokens, placement.attended, now)
        for end in (prefill, decode):
            if end.allowance:
                # A mixed worker's share is of whole requests, another's of its phase.
                half = prefill is decode or end.role is Role.MIXED
                end.allowance.take(demand.prompt_tokens, 0.5 if half else 1.0, now)
        for worker in {prefill, decode}:
            worker.outstanding += demand.choices
            self.prefixes.add(placement.chain, worker)
        if prefill is decode:
            self._decodes(placement)
        decode.running += demand.choices
        decode.context += placement.context
        decode.held += placement.held

    @staticmethod
    def _decodes(placement: Placement) -> None:
        """Its prompt is computed, or will be before one that is sent to its decode worker now."""
        demand, decode = placement.demand, placement.decode
        decode.decoding += demand.choices
        decode.outputs += placement.outputs
        if demand.tpot_s < math.inf and not demand.prefill_only:
            placement.limit = demand.tpot_s * placement.left
            decode.limited += demand.choices
            decode.allowed += placement.limit
            decode.limited_left += placement.left


def _placement(demand: Demand, chosen: Chosen, chain: Chain, now: float) -> Placement:
    tokens, attended = demand.work(chosen.prefill)
    output = 0.0 if demand.prefill_only else demand.output_tokens
    size = demand.prompt_tokens * chosen.prefill.cost.kv_token_bytes
    left = max(output - 1, 0.0) * demand.choices
    placement = Placement(
        demand=demand,
        chosen=chosen,
        chain=chain,
        tokens=tokens,
        attended=attended,
        outputs=left,
        left=left,
        context=(demand.prompt_tokens + output / 2) * demand.choices,
        held=demand.prompt_tokens + output * demand.choices,
        at=now,
    )
    placement.bytes = size if placement.split else 0.0
    return placement
