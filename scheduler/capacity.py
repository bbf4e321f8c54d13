"""Requests/s that one replica sustains at one request size, within the SLO.

From step times: with n sequences running, i tokens in and o out each, and prefill time P(i),

    prefill   1 / P(i)                   while P(i) ≤ TTFT
    decode    n / (o·step(n))            for the largest n with step(n) ≤ TPOT whose KV fits
    mixed     n / (o·step(n) + n·P(i))   the same with step(n) + n·P(i)/o ≤ TPOT: a token's period
                                         holds its share of the others' prefills; P(i) + step ≤ TTFT

These are means at full load: what chance adds is the part of `head_room`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler.messages import Role

if TYPE_CHECKING:
    from scheduler.profiles import Profile


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits in ms, and the share of requests that must meet both."""

    ttft_ms: float
    tpot_ms: float
    share: float = 0.9


class Capacity(NamedTuple):
    """`rate` in requests/s; `places`: how many requests a replica has under way at that rate."""

    rate: float
    places: float


def capacity(
    profile: Profile, role: Role, kv_tokens: int, size: tuple[float, float], slo: Slo
) -> Capacity | None:
    """At `size` (input, output) tokens; None where the SLO or the memory forbids even one."""
    inputs, outputs = size
    prompt = profile.prefill_ms(inputs, inputs * inputs) + profile.overhead_ms(inputs)
    fits = int(kv_tokens // (inputs + outputs)) if inputs + outputs else 0
    if role is Role.PREFILL:
        if prompt > slo.ttft_ms or kv_tokens < inputs:
            return None
        return Capacity(1e3 / prompt, slo.ttft_ms / prompt)
    others = prompt if role is Role.MIXED else 0.0
    batch = _largest(min(fits, profile.bounds.sequences), _Bound(profile, size, others, slo))
    if batch == 0:
        return None
    period = outputs * step_ms(profile, batch, size) + batch * others
    return Capacity(1e3 * batch / period, batch)


def step_ms(profile: Profile, batch: int, size: tuple[float, float]) -> float:
    """A decode step of `batch` such sequences, halfway through their outputs."""
    context = batch * (size[0] + size[1] / 2)
    return profile.decode_ms(batch, context) + profile.overhead_ms(context)


def tightest(
    profile: Profile, role: Role, kv_tokens: int, size: tuple[float, float]
) -> tuple[float, float] | None:
    """(TTFT, TPOT) in ms of one request alone: no SLO below can be met. None: it does not fit."""
    if kv_tokens < sum(size):
        return None
    prompt = profile.prefill_ms(size[0], size[0] ** 2) + profile.overhead_ms(size[0])
    step = step_ms(profile, 1, size)
    if role is Role.PREFILL:
        return prompt, 0.0
    if role is Role.DECODE:
        return 0.0, step
    return prompt + step, step + prompt / max(1.0, size[1])


class _Bound(NamedTuple):
    """Whether so many sequences keep the SLO; more sequences never make it easier."""

    profile: Profile
    size: tuple[float, float]
    prompt: float  # ms of others' prefills per request; 0 where they run elsewhere
    slo: Slo

    def holds(self, batch: int) -> bool:
        step = step_ms(self.profile, batch, self.size)
        token = step + batch * self.prompt / max(1.0, self.size[1])
        in_time = self.prompt == 0 or self.prompt + step <= self.slo.ttft_ms
        return in_time and token <= self.slo.tpot_ms


def _largest(most: int, bound: _Bound) -> int:
    """By bisection; 0 if not even one holds."""
    low, high = 0, most
    while low < high:
        middle = math.ceil((low + high) / 2)
        if bound.holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
