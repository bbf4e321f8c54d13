"""Rules for choosing a route, by name: one signature, nothing remembered between two requests.

All but `priced` are what other routers do, for comparison. They choose who decodes; if that worker
has the decode role, a prefill worker by the same rule computes the prompt.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from scheduler.messages import Role
from scheduler.routing import Chosen, Lanes, Policy, priced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.fleet import Worker
    from scheduler.pricing import Demand

THRESHOLD = 1024  # uncached prompt tokens from which prefix-threshold prefills elsewhere
# A cached prefix decides only while the load is even: SGLang's rule for its cache-aware router.
EVEN_DIFFERENCE, EVEN_RATIO = 32, 1.5

Pick = "Callable[[Sequence[Worker]], Worker]"


def round_robin(demand: Demand, lanes: Lanes, now: float, draw: Callable[[], float]) -> Chosen:
    """Everybody in turn."""
    return _by(lambda workers: workers[demand.number % len(workers)], lanes)


def least_load(demand: Demand, lanes: Lanes, now: float, draw: Callable[[], float]) -> Chosen:
    """The fewest choices outstanding."""
    return _by(_idlest, lanes)


def power_of_two(demand: Demand, lanes: Lanes, now: float, draw: Callable[[], float]) -> Chosen:
    """The less loaded of two taken at random (Mitzenmacher, 2001)."""
    return _by(lambda ws: _idlest([ws[int(draw() * len(ws))] for _ in range(2)]), lanes)


def prefix_threshold(
    demand: Demand,
    lanes: Lanes,
    now: float,
    draw: Callable[[], float],
    *,
    tokens: int = THRESHOLD,
) -> Chosen:
    """The longest cached prefix while load is even, else the least load.

    The prompt goes to a prefill worker if more than `tokens` of it are not cached where it decodes.
    """
    decode = _cached(demand, lanes.decode)
    if demand.prompt_tokens - demand.cached.get(decode, 0) <= tokens:
        return Chosen(decode, decode)
    others = [w for w in lanes.prefill if w.role is Role.PREFILL]
    return Chosen(_cached(demand, others) if others else decode, decode)


def _by(pick: Callable[[Sequence[Worker]], Worker], lanes: Lanes) -> Chosen:
    decode = pick(lanes.decode)
    others = [w for w in lanes.prefill if w.role is Role.PREFILL]
    if decode.role is Role.DECODE and others:
        return Chosen(pick(others), decode)
    return Chosen(decode, decode)


def _idlest(workers: Sequence[Worker]) -> Worker:
    return min(workers, key=lambda worker: (worker.outstanding, worker.name))


def _cached(demand: Demand, workers: Sequence[Worker]) -> Worker:
    loads = [worker.outstanding for worker in workers]
    even = max(loads) - min(loads) <= EVEN_DIFFERENCE or max(loads) <= EVEN_RATIO * min(loads)
    if even and demand.cached:
        return max(workers, key=lambda w: (demand.cached.get(w, 0), -w.outstanding, w.name))
    return _idlest(workers)


POLICIES: dict[str, Policy] = {
    "priced": priced,
    "round-robin": round_robin,
    "least-load": least_load,
    "power-of-two": power_of_two,
    "prefix-threshold": prefix_threshold,
}


def threshold(tokens: int) -> Policy:
    """prefix-threshold at another threshold."""
    return partial(prefix_threshold, tokens=tokens)
