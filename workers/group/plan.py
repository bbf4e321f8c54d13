"""What a group of unlike boxes can do with a model: shares, the time of a token, whom to leave out.

A rank computes its weights while a thread reads those that do not fit into its memory (of experts
only those that a token chooses), and waits for sums twice a layer; so with sums of `s` seconds a
token takes

    T = max over ranks of max(weights / rate + s, streamed bytes / disk)

In T a rank can take a part of the model that is bounded by its rate, and by its memory and what its
disk gives in T. The least T in which the ranks together can take all of it is found by bisection;
the shares are then cut to whole heads and columns (partition) and the prediction made of those.
Pure; what is measured comes in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.group.memory import is_expert, ring_bytes, slots_bytes, step_bytes
from workers.group.partition import Share, partition
from workers.group.sum_cost import fastest, predicted_s
from workers.weights.families import EMBEDDING, LM_HEAD, ROUTER, model_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

SUM_S = 5e-5  # of each sum beside the network: out of the kernels and back (measured on SmolLM2)
BETTER = 1.05  # how much faster it must be to leave a box out: rates are measured
LONGEST_S = 1e5  # of a token; what takes longer does not fit
STEPS = 60  # of the bisection
TRIALS, LESS = 8, 0.95  # of cutting so that every share fits, and how much less each time
TINY = 1e-3  # of the largest share, the least that is asked for: every rank gets something


class Box(msgspec.Struct, frozen=True):
    """One machine, as it was measured."""

    name: str
    weights_per_s: float  # by the kernels that multiply one row
    latency_s: float  # one way to rank 0
    link_bytes_per_s: float
    cap: int | None = None  # bytes of the whole process; None: all weights stay in memory
    disk_bytes_per_s: float = 0.0
    base: int = 0  # bytes of the process without any model


class Demand(msgspec.Struct, frozen=True):
    """A model, and what is to be done with it."""

    shape: ModelShape
    bytes_per_weight: float  # of the layers
    head_bytes_per_weight: float
    kv_bytes_per_token: float  # of all heads of all layers
    kv_tokens: int
    max_rows: int  # of a step


class Load(NamedTuple):
    """What a share asks of its rank; weights that are multiplied for a token, and bytes."""

    weights: float
    streamable: float
    resident: float  # what must stay: head, norms, KV cache, a step's buffers
    window: float  # that pass through what does not stay
    reread: float  # how much of that a token reads; below 1 where it chooses experts


class RankPlan(msgspec.Struct, frozen=True):
    """One rank's part of a plan."""

    name: str
    share: Share
    part: float  # of the weights that a token takes
    compute_s: float
    disk_s: float
    resident_bytes: int  # of its memory
    streamed_bytes: int  # read for every token
    missing_bytes: int = 0  # of memory


class Plan(msgspec.Struct, frozen=True):
    """Ranks in order, and what a token takes."""

    ranks: tuple[RankPlan, ...]
    left_out: tuple[str, ...]
    way: str  # of sums
    sums_s: float  # all of a token
    token_s: float
    bound: Literal["compute", "disk", "sums"]
    slowest: str  # the rank

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(rank.name for rank in self.ranks)


class Alternative(msgspec.Struct, frozen=True):
    """The same group without some of its boxes."""

    left_out: tuple[str, ...]
    token_s: float | None  # None: it cannot be
    reason: str = ""


class Choice(msgspec.Struct, frozen=True):
    """The plan that is best, and what was compared."""

    plan: Plan
    alternatives: tuple[Alternative, ...]


def choose(demand: Demand, boxes: Sequence[Box]) -> Choice:
    """The fastest plan; the first box, which speaks for the group, is never left out.

    Compared are: all boxes, all but any one, and the best of each number, found by leaving out
    one after another. Raises SetupError when none of them can be, for the reason why all cannot.
    """
    everybody = tuple(boxes)
    subsets = [everybody, *_without_one(everybody)]
    subsets += [subset for subset in _chain(demand, everybody) if subset not in subsets]
    plans: list[Plan] = []
    alternatives: list[Alternative] = []
    failures: list[SetupError] = []
    for subset in subsets:
        left_out = tuple(box.name for box in everybody if box not in subset)
        try:
            plan = make_plan(demand, subset, left_out)
        except SetupError as error:
            failures.append(error)
            alternatives.append(Alternative(left_out, None, str(error)))
            continue
        plans.append(plan)
        alternatives.append(Alternative(left_out, plan.token_s))
    if not plans:
        raise failures[0]
    best = min(plans, key=lambda plan: plan.token_s)
    if len(plans[0].ranks) == len(everybody) and plans[0].token_s < best.token_s * BETTER:
        best = plans[0]
    return Choice(best, tuple(alternatives))


def make_plan(demand: Demand, boxes: Sequence[Box], left_out: tuple[str, ...] = ()) -> Plan:
    """The best shares of these boxes, in their order. Raises SetupError if it does not fit."""
    token_s = _estimate(demand, boxes)
    if math.isinf(token_s):
        raise _too_small(demand, boxes)
    way, sums_s = _sums(demand.shape, boxes)
    parts = _parts(demand, boxes, token_s, sums_s)
    for _ in range(TRIALS):
        ranks = _ranks(demand, boxes, partition(demand.shape, parts))
        if not any(rank.missing_bytes for rank in ranks):
            return _plan(ranks, way, sums_s, left_out)
        # Whole heads are coarse: a rank whose memory was just enough got one too many.
        pairs = zip(parts, ranks, strict=True)
        parts = [part * LESS if rank.missing_bytes else part for part, rank in pairs]
    worst = max(ranks, key=lambda rank: rank.missing_bytes)
    raise SetupError(
        f"rank {worst.name} lacks {(worst.missing_bytes >> 20) + 1} MiB for its share: raise its "
        "memory cap, lower --kv-tokens, or add a rank"
    )


def _plan(ranks: tuple[RankPlan, ...], way: str, sums_s: float, left_out: tuple[str, ...]) -> Plan:
    compute = max(ranks, key=lambda rank: rank.compute_s)
    disk = max(ranks, key=lambda rank: rank.disk_s)
    if disk.disk_s >= compute.compute_s + sums_s:
        return Plan(ranks, left_out, way, sums_s, disk.disk_s, "disk", disk.name)
    bound: Literal["compute", "sums"] = "sums" if sums_s > compute.compute_s else "compute"
    return Plan(ranks, left_out, way, sums_s, compute.compute_s + sums_s, bound, compute.name)


def load_of(demand: Demand, shape: ModelShape) -> Load:
    """What a model of this shape (a share of the demand's) asks of whoever holds it."""
    tensors = model_tensors(shape)
    tensors[LM_HEAD] = tensors.pop(EMBEDDING)  # rows of the table are read from the file
    used, reread, staying = 0.0, 0.0, 0.0
    sizes: list[int] = []
    expert_sizes: list[int] = []
    chosen = shape.experts_used / shape.experts if shape.experts else 1.0
    for name, dims in tensors.items():
        count = math.prod(dims)
        if len(dims) == 1 or name.endswith(ROUTER):
            staying += 4 * count
            continue
        head = name == LM_HEAD
        size = int(count * (demand.head_bytes_per_weight if head else demand.bytes_per_weight))
        share = chosen if is_expert(name) else 1.0
        used += count * share
        if head:
            staying += size
            continue
        reread += size * share
        (expert_sizes if is_expert(name) else sizes).append(size)
    kv = demand.kv_bytes_per_token * shape.kv_heads / demand.shape.kv_heads * demand.kv_tokens
    resident = staying + kv + step_bytes(shape, demand.max_rows)
    moving = sum(sizes) + sum(expert_sizes)
    window = ring_bytes(sizes) + slots_bytes(expert_sizes)
    return Load(used, moving, resident, window, reread / moving if moving else 1.0)


def _ranks(demand: Demand, boxes: Sequence[Box], shares: Sequence[Share]) -> tuple[RankPlan, ...]:
    total = load_of(demand, demand.shape).weights
    pairs = zip(boxes, shares, strict=True)
    return tuple(_rank(demand, box, share, total) for box, share in pairs)


def _rank(demand: Demand, box: Box, share: Share, total: float) -> RankPlan:
    load = load_of(demand, share.shape(demand.shape))
    room = math.inf if box.cap is None else box.cap - box.base
    needed, streamed, missing = load.streamable + load.resident, 0.0, 0.0
    if needed > room:
        streamed = min(load.streamable, needed + load.window - room)
        least = load.resident + load.window
        if not box.disk_bytes_per_s:
            least, streamed = needed, 0.0
        missing = max(0.0, least - room)
        needed = min(needed, room)
    return RankPlan(
        name=box.name,
        share=share,
        part=load.weights / total,
        compute_s=load.weights / box.weights_per_s,
        disk_s=streamed * load.reread / box.disk_bytes_per_s if streamed else 0.0,
        resident_bytes=int(needed) + box.base,
        streamed_bytes=int(streamed * load.reread),
        missing_bytes=math.ceil(missing),
    )


def _sums(shape: ModelShape, boxes: Sequence[Box]) -> tuple[str, float]:
    """The way and the seconds of a token's 2L sums, on the worst of the boxes' links."""
    if len(boxes) == 1:
        return "none", 0.0
    latency_s = max(box.latency_s for box in boxes)
    rate = min(box.link_bytes_per_s for box in boxes)
    row = 4 * shape.hidden
    way = fastest(len(boxes), row, latency_s, rate)
    sum_s = SUM_S + predicted_s(way, len(boxes), row, latency_s, rate)
    return way, 2 * shape.layers * sum_s


# ── before cutting: parts of the model as if it could be cut anywhere ───────────────────────────


def _estimate(demand: Demand, boxes: Sequence[Box]) -> float:
    """The least seconds of a token; infinite if the model does not fit."""
    _, sums_s = _sums(demand.shape, boxes)
    whole, none = _ends(demand)

    def fits(token_s: float) -> bool:
        return sum(_most(box, whole, none, token_s, sums_s) for box in boxes) >= 1

    low, high = sums_s, LONGEST_S
    if not fits(high):
        return math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _parts(demand: Demand, boxes: Sequence[Box], token_s: float, sums_s: float) -> list[float]:
    """Of each box, relative to the others."""
    whole, none = _ends(demand)
    parts = [_most(box, whole, none, token_s, sums_s) for box in boxes]
    return [max(part, TINY * max(parts)) for part in parts]


def _ends(demand: Demand) -> tuple[Load, Load]:
    """All of the model and nothing of it; what lies between is near a straight line."""
    shape = demand.shape
    nothing = msgspec.structs.replace(shape, heads=0, kv_heads=0, ffn=0, expert_ffn=0, vocab=0)
    return load_of(demand, shape), load_of(demand, nothing)


def _most(box: Box, whole: Load, none: Load, token_s: float, sums_s: float) -> float:
    """The largest part of the model that a box can take with a token in `token_s`."""
    rate = box.weights_per_s * (token_s - sums_s) / whole.weights
    if box.cap is None:
        return min(rate, 1.0)
    room = box.cap - box.base

    fixed = none.resident
    staying = whole.resident - fixed
    all_stay = (room - fixed) / (whole.streamable + staying)
    if not box.disk_bytes_per_s:
        return max(0.0, min(rate, all_stay, 1.0))
    window = staying + whole.window
    passing = box.disk_bytes_per_s * token_s / whole.reread
    some_pass = (room - fixed + passing) / (whole.streamable + window)
    some_pass = min(some_pass, (room - fixed) / window)
    return max(0.0, min(rate, max(all_stay, some_pass), 1.0))


def _too_small(demand: Demand, boxes: Sequence[Box]) -> SetupError:
    """Which rank has the least of the memory that it would need for an equal part."""
    ranks = _ranks(demand, boxes, partition(demand.shape, [1.0] * len(boxes)))
    worst = max(ranks, key=lambda rank: rank.missing_bytes)
    return SetupError(
        f"the model does not fit into {len(boxes)} ranks: with equal shares rank {worst.name} "
        f"lacks {(worst.missing_bytes >> 20) + 1} MiB. Raise memory caps, lower --kv-tokens, or "
        "add a rank"
    )


# ── fewer boxes ─────────────────────────────────────────────────────────────────────────────────


def _without_one(boxes: tuple[Box, ...]) -> list[tuple[Box, ...]]:
    return [boxes[:index] + boxes[index + 1 :] for index in range(1, len(boxes))]


def _chain(demand: Demand, boxes: tuple[Box, ...]) -> list[tuple[Box, ...]]:
    """Fewer and fewer boxes, each time without the one whose loss costs least."""
    chain: list[tuple[Box, ...]] = []
    while len(boxes) > 1:
        boxes = min(_without_one(boxes), key=lambda subset: _estimate(demand, subset))
        chain.append(boxes)
    return chain
