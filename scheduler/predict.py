"""The arithmetic of a route's price, on numbers alone.

The router's `fleet.Worker` and the fast simulation's `simulate_book.Book` keep different records
of a worker; what follows from a record is reckoned here for both. Times are in seconds. One choice
asks a hundred times: comparisons stand where `max` and `min` would be calls.
"""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.cost import CostModel

MIXING_S = 3.0  # over which a worker's share of prompts is averaged
MOST_MIXED = 0.9  # of a worker's time: beyond, the line between load and latency is a wall
HANDOVER_S = 0.002  # words between the two workers, apart from the KV cache
LINK_WORK = 0.1  # of a core's time goes to a KV cache that is on the link, at each end
TAIL = 1 / 16  # of a KV cache moves after a prefill with which the rest has moved
SAFETY = 0.9  # of a limit: predictions err
ERROR = 0.1  # of a limit: the logistic scale of that error
SECOND = 0.01  # of a request that is late: what a second weighs among routes in time, and beyond
STEPS_TO_GRANT = 1.5  # until blocks are reserved: the rest of the step that runs, and the next
STEPS_TO_RESUME = 0.5  # until a KV cache that has arrived is decoded: the rest of the step
MARGIN = 1.05  # a hand-over between mixed workers must be better by so much: predictions err
PACE_TOKENS = 12.0  # so many tokens later by a second each weigh as much as the first one
ROLE = 2.0  # a decode worker is there to keep pace: what holds it up weighs so many times


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
    now = share * exp(-ago / MIXING_S)
    return now if now < MOST_MIXED else MOST_MIXED


def slowing(share: float, stall: float) -> float:
    """By what factor so many more seconds of prompts make steps longer."""
    return (1 - share) / (1 - min(MOST_MIXED, share + stall / MIXING_S))


def crowding(
    held: float, need: float, kv_tokens: float, running: float, more: float, places: float
) -> float:
    """The share of what runs that must end before there are blocks and places for more."""
    if held + need <= kv_tokens and running + more <= places:
        return 0.0
    over = (held + need - kv_tokens) / (held if held > 1 else 1.0)
    outside = (running + more - places) / (running if running < places else places)
    return over if over > outside else outside


def turnover_s(left: float, outputs: float, decoding: float, tpot: float) -> float:
    """Until as many have ended as decode now, where `left` of `outputs` tokens are to come.

    Met at any moment they are half done, on the mean; long answers are met more often than they
    begin, so it is a prediction's whole length at least.
    """
    whole = outputs if outputs > 2 * left else 2 * left
    return whole / (decoding if decoding > 1 else 1) * tpot


def handed_tpot_s(tpot: float, exposed: float, tokens: float, step: float) -> float:
    """TPOT where the KV cache is `exposed` on the link before the second of so many tokens.

    `step`: of the worker that goes on, which takes it in between two.
    """
    return tpot + (HANDOVER_S + exposed + STEPS_TO_RESUME * step) / tokens


def hidden_s(exposed: float, moving: float, computing: float) -> float:
    """What is exposed of a KV cache whose layers move while the prompt is computed."""
    left, tail = exposed - computing, TAIL * moving
    return left if left > tail else tail


def risk(share: float) -> float:
    """The chance that what is predicted to take this share of its limit is late."""
    return 1 / (1 + exp((1 - share) / ERROR))


def queued(share: float, behind: float) -> float:
    """How many will be late: one that is predicted to take this share of its limit, and of those
    who come while it waits, whom it keeps waiting for `behind`, a share too, in all.

    As many come as wait now (Little, 1961), and each waits for this prompt as well; where they wait
    for places, for one turn of as many. What a queue costs is its length times the risk of who
    joins it; this is the slope of that.
    """
    late = risk(share)
    return late + behind * late * (1 - late) / ERROR


def made_late(sequences: float, used: float, more: float, allowed: float) -> float:
    """How many of those who run would be late by `more` seconds in all, who were not.

    By now they need `used` of the seconds that their limits allow in all: a mean stands for each.
    """
    if not allowed:
        return 0.0
    return sequences * (risk((used + more) / allowed) - risk(used / allowed))


def met(tokens: float, tpot: float, limit: float, stall: float) -> float:
    """How many of those who are handed over to a worker find a prompt there, and are late by it.

    Prompts elsewhere take about as long: one of them comes while this one is computed, and waits
    for half of it. Its answer is taken to be like this one's.
    """
    return made_late(1.0, tokens * tpot, stall / 2, tokens * limit)


def weight(ttft: float, tpot: float, behind: float) -> float:
    """Of a route where there are no limits, in seconds; `behind`: see `queued`."""
    return ttft + behind + PACE_TOKENS * tpot


def held_up(decoding: float, outputs: float, stall: float) -> float:
    """The same of those who decode, if they stop once; they will give so many tokens in all."""
    mean = outputs / decoding if decoding else 0.0
    return PACE_TOKENS * decoding * stall / (mean if mean > 1 else 1.0)


def slowed(running: float, each: float) -> float:
    """The same of those who decode or will, if every step takes so much longer."""
    return PACE_TOKENS * running * each
