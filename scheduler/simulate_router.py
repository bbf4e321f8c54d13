"""The router in a simulation: what it knows of each worker, and the routes that it chooses.

It keeps the counts that the live router keeps (prompt tokens on their way to a first token,
sequences that decode), learns the mean answer's length as that one does, and sees a worker's
speed as of the last heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from scheduler.cost import MEASURED_PROMPT
from scheduler.messages import Address, Rates
from scheduler.routing import Route, WorkerView, choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.cost import CostModel
    from scheduler.simulate_spec import WorkerSpec

OUTPUT_TOKENS = 128.0  # of an answer, before any was seen
LEARN = 0.05  # weight of the newest answer in their mean
NOWHERE = Address("", 0)


class Choose(Protocol):
    """`routing.choose`, or a policy to compare it with. Raises Unavailable to refuse."""

    def __call__(
        self, prompt_tokens: int, output_tokens: int, workers: Sequence[WorkerView]
    ) -> Route: ...


@dataclass(slots=True)
class Known:
    """What the router knows of a worker."""

    number: int
    spec: WorkerSpec
    rates: Rates
    queued_tokens: int = 0
    running: int = 0

    @property
    def view(self) -> WorkerView:
        spec = self.spec
        return WorkerView(
            name=spec.name,
            role=spec.role,
            address=NOWHERE,
            rates=self.rates,
            kv_tokens=spec.kv_tokens,
            queued_tokens=self.queued_tokens,
            running=self.running,
        )


@dataclass(slots=True)
class Placed:
    """Where a request is, and what it adds to the workers' load."""

    prefill: Known
    decode: Known
    tokens: int
    prefilled: bool = False

    @property
    def split(self) -> bool:
        return self.prefill is not self.decode


class Router:
    def __init__(self, workers: Sequence[WorkerSpec], policy: Choose = choose) -> None:
        self._choose = policy
        self._known = {
            spec.name: Known(number, spec, rates_of(spec.believed or spec.cost))
            for number, spec in enumerate(workers)
        }
        self._output_tokens = OUTPUT_TOKENS

    def place(self, tokens: int, most: int) -> tuple[Placed, Route]:
        """Choose a route for a prompt and an answer of at most so many. Raises Unavailable."""
        views = [known.view for known in self._known.values()]
        route = self._choose(tokens, min(int(self._output_tokens), most), views)
        prefill = self._known[route.worker]
        decode = self._known[route.handoff.name] if route.handoff else prefill
        prefill.queued_tokens += tokens
        decode.running += 1
        return Placed(prefill, decode, tokens), route

    def prefilled(self, placed: Placed) -> None:
        """Its first token is here. Idempotent."""
        if not placed.prefilled:
            placed.prefilled = True
            placed.prefill.queued_tokens -= placed.tokens

    def ended(self, placed: Placed, outputs: int) -> None:
        """All its tokens are; none, where it was given up."""
        self.prefilled(placed)
        placed.decode.running -= 1
        if outputs:
            self._output_tokens += LEARN * (outputs - self._output_tokens)

    def heard(self, worker: str, cost: CostModel) -> None:
        """A heartbeat says how fast this worker has become."""
        self._known[worker].rates = rates_of(cost)


def rates_of(cost: CostModel) -> Rates:
    """What a worker of this speed measures of itself before it joins."""
    return Rates(
        prefill_tokens_per_s=MEASURED_PROMPT / cost.prefill_s(MEASURED_PROMPT),
        decode_s_per_token=cost.decode_step_s(1, MEASURED_PROMPT + 1),
    )
