"""The arithmetic of a route's price, on numbers alone.

The router's `fleet.Worker` and the fast simulation's `simulate_market.Book` keep different records
of a worker; what follows from a record is reckoned here for both. Times are in seconds. One choice
asks a hundred times: comparisons stand where `max` and `min` would be calls.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.cost import CostModel

MIXING_S = 5.0  # over which a worker's share of prompts is averaged
MOST_MIXED = 0.9  # of a worker's time: beyond, the line between load and latency is a wall
HANDOVER_S = 0.002  # words between the two workers, apart from the KV cache
LINK_WORK = 0.1  # of a core's time goes to a KV cache that is on the link, at each end
TAIL = 1 / 16  # of a KV cache moves after a prefill with which the rest has moved
SAFETY = 0.9  # of a limit: predictions err
STALL = 2.0  # slack is a mean: so many times the stall keeps most of those who run in time


def token_s(cost: CostModel, running: float, context: float, chunk: int) -> float:
    """A prompt token without its attention, in pieces beside sequences that run."""
    room, least = chunk - running, chunk // 4
    if room < least:
        room = least
    return cost.token + cost.decode_step_s(running, context) / room


def full_token_s(cost: CostModel, chunk: int) -> float:
    """The same in a step that nobody shares."""
    return cost.token + cost.step / chunk


def queue_s(work: float, jobs: int, gone: float) -> float:
    """What is left of `jobs` prompts when the head has run for `gone`: no more than it is over."""
    head = work / jobs
    return work - head if gone > head else work - gone if gone > 0 else work


def mixed(share: float, ago: float) -> float:
    """The share of a worker's time that goes to prompts, from what it was `ago`."""
    now = share * math.exp(-ago / MIXING_S)
    return now if now < MOST_MIXED else MOST_MIXED


def slowing(share: float, stall: float) -> float:
    """By what factor so many more seconds of prompts make steps longer."""
    return (1 - share) / (1 - min(MOST_MIXED, share + stall / MIXING_S))


def slack_s(allowed: float, gone: float, left: float, sequences: float) -> float:
    """Seconds that each may be held up: of those allowed, what is neither gone nor needed."""
    return (allowed - gone - left) / sequences


def crowding(
    held: float, need: float, kv_tokens: float, running: float, more: float, places: float
) -> float:
    """The share of what runs that must end before there are blocks and places for more."""
    if held + need <= kv_tokens and running + more <= places:
        return 0.0
    over = (held + need - kv_tokens) / max(held, 1.0)
    return max(over, (running + more - places) / running)


def residual_s(left: float, outputs: float, running: float, tpot: float) -> float:
    """How long a running sequence still takes, on the mean, where `left` of `outputs` tokens are.

    Long answers are met more often than they begin, so half a prediction is left at least.
    """
    return max(left, outputs / 2) / max(running, 1) * tpot


def handed_tpot_s(tpot: float, exposed: float, tokens: float) -> float:
    """TPOT where the KV cache is `exposed` on the link before the second of so many tokens."""
    return tpot + (HANDOVER_S + exposed) / tokens


def hidden_s(exposed: float, moving: float, computing: float) -> float:
    """What is exposed of a KV cache whose layers move while the prompt is computed."""
    left, tail = exposed - computing, TAIL * moving
    return left if left > tail else tail


def lateness(seconds: float, limit: float) -> float:
    """Relative: 0.5 is half a limit beyond it; 0 is in time."""
    return seconds / limit - SAFETY if seconds > SAFETY * limit else 0.0


def harm(stall: float, slack: float, sequences: float, allowed: float) -> float:
    """How late those who run would be after the stall, relative to what their limits allow."""
    missing = STALL * stall - slack
    return missing * sequences / allowed if missing > 0 and allowed else 0.0
