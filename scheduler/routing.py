"""Which workers take a request: a pure function of what the router knows.

Candidates are priced (`scheduler.pricing`) on the very workers that they would use: whole on a
mixed worker, whole on a decode worker, prefill on one and decode on another. The least toll wins:
what the route costs the request and all who already run there. With limits and a plan's prices it
is the cheapest of those that hardly make anybody late. A request that would make as many late as it
serves is refused, with the time after which it will not; where no idle worker could keep its limits
either, the least late route serves it. `POLICIES` has simpler rules to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypeVar

from scheduler.errors import Unavailable
from scheduler.messages import Role
from scheduler.pricing import Pricer
from scheduler.request import FIRST_COME, Turn
from scheduler.shares import rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.fleet import Fleet, Worker
    from scheduler.messages import Peer
    from scheduler.pricing import Decoded, Demand, Price, Prompted

MAX_WAIT_S = 300.0  # a predicted wait for the first token that nobody is asked to sit out
IN_TIME = 0.5  # requests expected to be late by a route that is still taken for its price
HOPELESS = 1.0  # requests expected to be late: serving it gains no more than it loses
PAIRED = 3  # workers at each end of a hand-over that are priced in pairs

Degraded = Literal["no_prefill", "no_decode"]


class Route(NamedTuple):
    """`worker` computes the prompt, and the rest too unless there is a `handoff`."""

    worker: str
    handoff: Peer | None = None
    turn: Turn = FIRST_COME


@dataclass(frozen=True, slots=True)
class Lanes:
    """Whom a request may use, by phase: a mixed worker may do either, or both."""

    prefill: tuple[Worker, ...]
    decode: tuple[Worker, ...]  # these may take the whole request too
    degraded: Degraded | None = None  # a role is missing, so a worker does what is not its role


class Chosen(NamedTuple):
    """One worker twice: no hand-over. Without a price the policy has not asked for one."""

    prefill: Worker
    decode: Worker
    price: Price | None = None
    degraded: Degraded | None = None


End = TypeVar("End", "Prompted", "Decoded")
Policy: TypeAlias = "Callable[[Demand, Lanes, float, Callable[[], float]], Chosen]"


def choose(
    demand: Demand,
    fleet: Fleet,
    now: float,
    draw: Callable[[], float],
    policy: Policy,
    *,
    local: bool = True,
) -> Chosen:
    """The policy's route. Raises Unavailable, with an honest retry_after, if there is none.

    Workers in `avoid` have failed this request before; they are used only if nobody else is left.
    Without `local` a model whose prefill workers are all gone refuses requests. `now` is in seconds
    of any clock that the fleet was told of; `draw` gives numbers in [0, 1).
    """
    lanes = _lanes(demand, fleet.candidates(now, draw))
    if lanes.degraded == "no_prefill" and not local and not demand.avoid and demand.split:
        raise Unavailable(
            "no prefill worker is here, and decode workers are told to take no prompts"
        )
    chosen = policy(demand, lanes, now, draw)
    return chosen._replace(degraded=lanes.degraded)


def _lanes(demand: Demand, workers: Sequence[Worker]) -> Lanes:
    """Raises Unavailable if there is nobody."""
    usable = [w for w in workers if w.name not in demand.avoid] if demand.avoid else workers
    usable = usable or workers
    if not usable:
        raise Unavailable("no worker for this model is ready", retry_after=2)
    prefill = tuple(w for w in usable if w.role is not Role.DECODE)
    decode = tuple(w for w in usable if w.role is not Role.PREFILL)
    if demand.prefill_only:
        return Lanes((), tuple(usable))
    if not decode:
        return Lanes((), tuple(usable), "no_decode")
    need = demand.prompt_tokens + demand.choices * demand.output_tokens
    roomy = tuple(w for w in decode if w.kv_tokens >= need) or decode
    if not prefill:
        return Lanes((), roomy, "no_prefill")
    return Lanes(prefill if demand.split else (), roomy)


# ── priced ──────────────────────────────────────────────────────────────────────────────────────


def priced(demand: Demand, lanes: Lanes, now: float, draw: Callable[[], float]) -> Chosen:
    """The cheapest in time. Raises Unavailable (429) if all would only be made late."""
    pricer = Pricer(demand, now)
    outputs = [pricer.decoded(worker) for worker in lanes.decode]
    prompts = {output.worker: pricer.prompted(output.worker, output) for output in outputs}
    prices = [pricer.whole(prompts[output.worker], output) for output in outputs]
    if lanes.prefill:
        senders = [prompts.get(worker) or pricer.prompted(worker, None) for worker in lanes.prefill]
        receivers = _best(outputs, key=lambda end: end.toll + pricer.toll(0.0, end.tpot, 0.0))
        senders = _best(senders, key=lambda end: end.toll + pricer.toll(end.ttft, 0.0, end.behind))
        prices += [
            pricer.split(prompt, output)
            for prompt in senders
            for output in receivers
            if prompt.worker.may_hand_to(output.worker)
        ]
    best = min(prices, key=_by_plan if demand.limited else _by_toll)
    if demand.limited and best.toll > HOPELESS and pricer.possible(lanes.decode):
        raise _overload(min(pricer.late_s(price) for price in prices))
    if best.wait > MAX_WAIT_S:
        raise _overload(min(price.wait for price in prices) - MAX_WAIT_S)
    return Chosen(best.prefill, best.decode, best)


def _best(ends: list[End], key: Callable[[End], float]) -> list[End]:
    """One end of a hand-over: all, or of many the best by themselves."""
    return ends if len(ends) <= PAIRED else sorted(ends, key=key)[:PAIRED]


def _by_plan(price: Price) -> tuple[bool, int, float, str, str]:
    """The cheapest in time, else whoever makes the fewest late."""
    risky = price.toll > IN_TIME
    cost = 0 if risky else rounded(price.cost)
    return risky, cost, price.toll, price.prefill.name, price.decode.name


def _by_toll(price: Price) -> tuple[float, str, str]:
    return price.toll, price.prefill.name, price.decode.name


def _overload(seconds: float) -> Unavailable:
    """Serving it would only make it, and those behind it, late."""
    message = f"the limits of this request can be kept again in about {seconds:.1f} s"
    return Unavailable(message, retry_after=seconds, status=429)
