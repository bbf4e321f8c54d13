"""The router in a simulation: the live router's placements, on simulated time.

It hears what the live one hears: first and last tokens as they come, everything else of a worker,
its speed and how far its sequences are, with heartbeats. A worker's heartbeats are heard when
somebody looks at it: those between would be forgotten, and a choice among ten thousand workers
looks at a few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scheduler.affinity import Chain
from scheduler.fleet import Fleet, Worker
from scheduler.messages import Address, Peer
from scheduler.placing import Placement, Placer
from scheduler.pricing import Demand
from scheduler.routing import Route, priced
from scheduler.shares import Allowance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.capacity import Slo
    from scheduler.cost import CostModel
    from scheduler.routing import Policy
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival

NOWHERE = Address("", 0)
PREFIX_TOKENS = 512  # of one prefix id
HEARTBEAT_S = 0.25


@dataclass(eq=False, slots=True)
class Placed:
    """Where a request is."""

    number: int
    placement: Placement
    prefill: int  # worker numbers
    decode: int
    split: bool
    told: int = 1  # tokens that the router has heard of


class Heard(Fleet):
    """Whoever is looked at was heard a moment ago."""

    def __init__(self, hear: Callable[[Worker, float], None]) -> None:
        super().__init__()
        self._hear = hear

    def candidates(self, now: float, draw: Callable[[], float]) -> list[Worker]:
        found = super().candidates(now, draw)
        for worker in found:
            self._hear(worker, now)
        return found


@dataclass(slots=True)
class Router:
    """`slo`: the limits that each request comes with; None: none.

    `emitted` says how many tokens each request has, by its number, that a worker runs at a time.
    """

    workers: Sequence[WorkerSpec]
    policy: Policy = priced
    slo: Slo | None = None
    overlap: bool = False
    emitted: Callable[[int, float], dict[int, int]] = (
        lambda worker, now: {}
    )  # tokens by request, of a worker
    placer: Placer = field(init=False)
    _numbers: dict[str, int] = field(init=False)
    _placed: dict[int, Placed] = field(init=False)
    _heard: list[float] = field(init=False)

    def __post_init__(self) -> None:
        fleet = Heard(self._hear)
        plans = {spec.kind: Allowance(spec.plan) for spec in self.workers if spec.plan}
        for spec in self.workers:
            fleet.add(_worker(spec, self.overlap, plans.get(spec.kind)))
        self.placer = Placer(fleet, np.random.default_rng(0).random, self.policy)
        self._numbers = {spec.name: number for number, spec in enumerate(self.workers)}
        self._placed = {}
        self._heard = [0.0] * len(self.workers)

    def place(self, number: int, request: Arrival, now: float) -> tuple[Placed, Route]:
        """Choose a route. Raises Unavailable."""
        placer, slo = self.placer, self.slo
        demand = Demand(
            prompt_tokens=request.input,
            output_tokens=placer.forecast.output_tokens(request.input),
            ttft_s=slo.ttft_ms / 1e3 if slo else math.inf,
            tpot_s=slo.tpot_ms / 1e3 if slo else math.inf,
            prefill_only=request.output == 1,
            number=number,
        )
        placement = placer.place(demand, _chain(request), now)
        prefill, decode = placement.prefill, placement.decode
        split = placement.split
        placed = Placed(
            number, placement, self._numbers[prefill.name], self._numbers[decode.name], split
        )
        self._placed[number] = placed
        return placed, Route(prefill.name, Peer(decode.name, NOWHERE) if split else None)

    def prefilled(self, placed: Placed, cached: int, now: float) -> None:
        """Its first token is here."""
        self.placer.first(placed.placement, now, cached)

    def handed_over(self, placed: Placed, now: float) -> None:
        """Its KV cache has arrived."""
        self.placer.arrived(placed.placement, now)

    def ended(self, placed: Placed, request: Arrival, *, served: bool, now: float) -> None:
        """All its tokens are here, or it was given up."""
        del self._placed[placed.number]
        self.placer.end(placed.placement, now)
        if served and request.output > 1:
            forecast = self.placer.forecast
            forecast.learn_growth(request.input, placed.told, request.output)
            forecast.learn_end(request.input, request.output)

    def heard(self, worker: str, cost: CostModel) -> None:
        """A heartbeat says how fast this worker has become."""
        if known := self.placer.fleet.get(worker):
            known.cost = cost

    def _hear(self, worker: Worker, now: float) -> None:
        """Its tokens that have come since, once a heartbeat at most."""
        at = self._numbers[worker.name]
        if now - self._heard[at] < HEARTBEAT_S:
            return
        self._heard[at] = now
        for number, tokens in self.emitted(at, now).items():
            placed = self._placed.get(number)
            if placed and placed.decode == at and tokens > placed.told:
                self.placer.emitted(placed.placement, tokens - placed.told)
                prompt = placed.placement.demand.prompt_tokens
                self.placer.forecast.learn_growth(prompt, placed.told, tokens)
                placed.told = tokens


def _worker(spec: WorkerSpec, overlap: bool, allowance: Allowance | None) -> Worker:
    return Worker(
        name=spec.name,
        role=spec.role,
        address=NOWHERE,
        cost=spec.believed or spec.cost,
        kv_tokens=spec.kv_tokens,
        step_tokens=spec.max_step_tokens,
        places=spec.max_sequences,
        allowance=allowance,
        overlaps=overlap,
    )


def _chain(request: Arrival) -> Chain:
    if not request.prefix:
        return Chain()
    ends = (min(PREFIX_TOKENS * (at + 1), request.input) for at in range(len(request.prefix)))
    return Chain(request.prefix, tuple(ends), request.input)
