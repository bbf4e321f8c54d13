"""Which workers take a request: a pure function of what the router knows.

Each possible route is priced in predicted seconds until the request's last token,

    (queued + prompt tokens) / prefill rate  +  output tokens · decode seconds per token

on the very workers it would use, with the rates that they measured of themselves. The cheapest
route wins. Splitting and not splitting compete on the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.errors import Unavailable
from scheduler.messages import Address, Peer, Rates, Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# A decode step reads the weights once for the whole batch, so B sequences cost much less than B
# times one: measured throughput grows about 4-fold from batch 1 to 16, i.e. step time by 1/5 of
# a lone step for each further sequence.
STEP_GROWTH = 0.2
MAX_WAIT_S = 300.0  # beyond this predicted wait for the first token a request is refused


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What routing knows of one worker of the request's model."""

    name: str
    role: Role
    address: Address
    rates: Rates
    kv_tokens: int = 1 << 62  # that its KV cache holds
    queued_tokens: int = 0  # prompt tokens sent to it and not yet through prefill
    running: int = 0  # sequences it decodes, or will
    draining: bool = False

    def prefill_s(self, tokens: int) -> float:
        """Predicted seconds until the first token of a prompt sent now."""
        return (self.queued_tokens + tokens) / self.rates.prefill_tokens_per_s

    def decode_s(self, tokens: int) -> float:
        """Predicted seconds for `tokens` further tokens beside what runs there."""
        return tokens * self.rates.decode_s_per_token * (1 + STEP_GROWTH * self.running)


@dataclass(frozen=True, slots=True)
class Route:
    """`worker` computes the prompt, and the rest too unless there is a `handoff`."""

    worker: str
    handoff: Peer | None = None
    degraded: bool = False  # a role is missing, so a worker does what is not its role


def choose(
    prompt_tokens: int,
    output_tokens: int,
    workers: Sequence[WorkerView],
    avoid: frozenset[str] = frozenset(),
    split: bool = True,
) -> Route:
    """The cheapest route. Raises Unavailable, with an honest retry_after, if there is none.

    Workers in `avoid` have failed this request before; they are used only if nobody else is left.
    Without `split` the request stays on one worker, its decode worker computing the prompt too.
    """
    usable = [w for w in workers if not w.draining]
    usable = [w for w in usable if w.name not in avoid] or usable
    if not usable:
        raise Unavailable("no worker for this model is ready", retry_after=2)
    whole = {Role.MIXED} if split else {Role.MIXED, Role.DECODE}
    priced = list(_split(prompt_tokens, output_tokens, usable)) if split else []
    priced += _whole(prompt_tokens, output_tokens, usable, whole)
    degraded = not priced
    if degraded:
        priced = list(_whole(prompt_tokens, output_tokens, usable, set(Role)))
    _, wait, worker, handoff = min(priced, key=lambda row: row[:3])
    if wait > MAX_WAIT_S:
        raise Unavailable(
            f"the queue is {wait:.0f} s long", retry_after=wait - MAX_WAIT_S, status=429
        )
    return Route(worker, handoff, degraded)


Priced = tuple[float, float, str, Peer | None]  # seconds in all, seconds to first token, route


def _split(prompt: int, output: int, workers: Sequence[WorkerView]) -> Iterator[Priced]:
    """Prefill on one worker, decode on another."""
    decodes = _roomy((w for w in workers if w.role is Role.DECODE), prompt + output)
    if not decodes:
        return
    decode = min(decodes, key=lambda w: (w.decode_s(output), w.name))
    for prefill in _roomy((w for w in workers if w.role is Role.PREFILL), prompt):
        wait = prefill.prefill_s(prompt)
        peer = Peer(decode.name, decode.address)
        yield wait + decode.decode_s(output), wait, prefill.name, peer


def _whole(
    prompt: int, output: int, workers: Iterable[WorkerView], roles: set[Role]
) -> Iterator[Priced]:
    """Everything on one worker."""
    for worker in _roomy((w for w in workers if w.role in roles), prompt + output):
        wait = worker.prefill_s(prompt)
        yield wait + worker.decode_s(output), wait, worker.name, None


def _roomy(workers: Iterable[WorkerView], tokens: int) -> list[WorkerView]:
    """Those whose KV cache holds so many tokens, or all if none does: it is an estimate."""
    known = list(workers)
    return [w for w in known if w.kv_tokens >= tokens] or known
