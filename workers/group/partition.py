"""Who holds what of a model: uneven tensor parallelism over any number of ranks.

Attention is cut between query heads. With at least as many kv heads as ranks a rank gets whole kv
groups (a kv head and the query heads that share it); with fewer, a group is shared by neighbouring
ranks, each of which keeps its kv head too. Feed-forwards are cut in units of columns, the
vocabulary in panels of rows. The kernels of `fast` mode multiply whole blocks, so there heads that
are no whole blocks stay together in as many as fill some. A rank's part of a layer's output is a
sum over its own heads and columns, so the ranks' parts add up to the whole (Shoeybi et al. 2019,
Megatron-LM, §3).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.models import ModelShape

BLOCK = 32  # columns that share a scale in the finest of the block formats
VOCAB_UNIT = 16  # rows of a panel (kernels/cpu/formats.h)


Mode: TypeAlias = Literal["fast", "exact"]


class Range(msgspec.Struct, frozen=True, array_like=True):
    """[first, last) of something that is cut."""

    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    def times(self, width: int) -> Range:
        """The same in units that are `width` times as fine."""
        return Range(self.first * width, self.last * width)


class Share(msgspec.Struct, frozen=True):
    """What one rank holds of a model."""

    heads: Range  # query heads, of H
    kv_heads: Range  # of K; neighbours may both hold one
    ffn: Range  # columns, of F
    expert_ffn: Range  # of each expert
    vocab: Range  # rows of the head, of V

    def shape(self, whole: ModelShape) -> ModelShape:
        """The model as this rank sees it: narrower, and as deep as ever."""
        return msgspec.structs.replace(
            whole,
            heads=self.heads.count,
            kv_heads=self.kv_heads.count,
            ffn=self.ffn.count,
            expert_ffn=self.expert_ffn.count,
            vocab=self.vocab.count,
        )


def most_ranks(shape: ModelShape, mode: Mode) -> int:
    """How many ranks can share a model's attention."""
    step, group = _step(shape, mode), shape.heads // shape.kv_heads
    return shape.heads // math.lcm(step, 1 if group % step == 0 else group)


def partition(
    shape: ModelShape, weights: Sequence[float], mode: Mode = "fast"
) -> tuple[Share, ...]:
    """Each rank's share, as near to its weight as whole units go; every rank gets some of all.

    Heads are coarse, so the feed-forward's columns make up for what they leave uneven. Raises
    SetupError if there are more ranks than units of anything.
    """
    ranks, relative = len(weights), [weight / sum(weights) for weight in weights]
    if ranks > (most := most_ranks(shape, mode)):
        step = _step(shape, mode)
        narrow = f", which go {step} by {step} (in --mode exact one by one)" * (step > 1)
        raise SetupError(
            f"{ranks} ranks for {shape.heads} query heads{narrow}: leave out {ranks - most}"
        )
    heads, kv_heads = _heads(shape, relative, _step(shape, mode))
    by_head = 2 * shape.head_dim * shape.hidden * (1 + shape.kv_heads / shape.heads)
    by_column = 3 * shape.hidden
    ffn = shape.ffn if len(shape.expert_layers) < shape.layers else 0
    columns = ffn or shape.experts_used * shape.expert_ffn
    layer = by_head * shape.heads + by_column * columns
    wanted = [
        max(0.0, r * layer - by_head * part.count) for r, part in zip(relative, heads, strict=True)
    ]
    floor = 1e-3 * max(wanted)
    compensated = [max(weight, floor) for weight in wanted]

    def cut(total: int, unit: int, by: Sequence[float]) -> list[Range]:
        if total == 0:
            return [Range(0, 0)] * ranks
        if total % unit:
            raise SetupError(f"a width of {total} cannot be cut into units of {unit}")
        return [part.times(unit) for part in _ranges(apportion(total // unit, by))]

    ffns = cut(shape.ffn, _unit(shape.ffn, BLOCK), compensated)
    expert_ffns = cut(shape.expert_ffn, _unit(shape.expert_ffn, BLOCK), compensated)
    vocabs = cut(shape.vocab, _unit(shape.vocab, VOCAB_UNIT), relative)
    parts = zip(heads, kv_heads, ffns, expert_ffns, vocabs, strict=True)
    return tuple(Share(*part) for part in parts)


def apportion(units: int, weights: Sequence[float]) -> list[int]:
    """Whole units for each, one at least, so that the largest units/weight is as small as can be.

    Raises SetupError if there are fewer units than weights.
    """
    if units < len(weights):
        raise SetupError(f"{units} pieces cannot be shared by {len(weights)} ranks")
    counts = [1] * len(weights)
    for _ in range(units - len(weights)):
        ahead = [(count + 1) / weight for count, weight in zip(counts, weights, strict=True)]
        counts[ahead.index(min(ahead))] += 1
    return counts


def _unit(total: int, unit: int) -> int:
    """The unit, or single columns for a model too narrow for it (those run in exact mode)."""
    return unit if total % unit == 0 else 1


def _step(shape: ModelShape, mode: Mode) -> int:
    """How many query heads fill whole blocks; 1 for a model that runs in exact mode anyhow."""
    step = BLOCK // math.gcd(BLOCK, shape.head_dim) if mode == "fast" else 1
    return step if shape.heads % step == 0 else 1


def _heads(
    shape: ModelShape, weights: Sequence[float], step: int
) -> tuple[list[Range], list[Range]]:
    """Query heads, in multiples of `step`, and kv heads of each rank."""
    group = shape.heads // shape.kv_heads  # query heads that share a kv head
    least = math.lcm(step, group) // group  # kv heads whose groups fill whole steps
    if len(weights) <= shape.kv_heads // least:
        kv = [part.times(least) for part in _ranges(apportion(shape.kv_heads // least, weights))]
        return [part.times(group) for part in kv], kv
    heads: list[Range] = []
    kv_heads: list[Range] = []
    first, pieces = 0, group // step  # of a group, which are whole: else the ranks are too many
    for number, ranks in enumerate(_ranks_of_groups(shape.kv_heads, pieces, weights)):
        parts = _ranges(apportion(pieces, weights[first : first + ranks]), number * pieces)
        heads += [part.times(step) for part in parts]
        kv_heads += [Range(number, number + 1)] * ranks
        first += ranks
    return heads, kv_heads


def _ranks_of_groups(groups: int, pieces: int, weights: Sequence[float]) -> tuple[int, ...]:
    """How many neighbouring ranks share each kv group, which has so many pieces.

    By dynamic programming over groups: the slowest rank is as fast as can be.
    """

    @cache
    def best(number: int, first: int) -> tuple[float, tuple[int, ...]]:
        left = len(weights) - first
        if number == groups:
            return (0.0 if left == 0 else math.inf), ()
        options: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for ranks in range(1, min(pieces, left) + 1):
            own = weights[first : first + ranks]
            slowest = max(c / w for c, w in zip(apportion(pieces, own), own, strict=True))
            later, counts = best(number + 1, first + ranks)
            options.append((max(slowest, later), (ranks, *counts)))
        return min(options)

    return best(0, 0)[1]


def _ranges(counts: Sequence[int], start: int = 0) -> list[Range]:
    ranges: list[Range] = []
    for count in counts:
        ranges.append(Range(start, start + count))
        start += count
    return ranges
