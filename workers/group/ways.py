"""Which way sums travel: measured when a group forms, since no formula knows its machines.

The formulas of `allreduce` rank the ways where the network is all that counts. Ranks that share
cores, or a busy gateway, do otherwise: every way is tried with the sizes that a model's steps have.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np

from workers.group.allreduce import ALGORITHMS
from workers.group.allreduce_int8 import ALGORITHMS_INT8
from workers.group.words import Try

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from workers.group.allreduce import Array, Mesh
    from workers.group.words import Word

ALL = ALGORITHMS | ALGORITHMS_INT8
# What is likely the fastest for long sums comes first: on slow links there is no time for all.
IN_TURN = ("two-shot-int8", "two-shot", "ring", "direct-int8", "direct", "star")
ALWAYS = 1 << 62
COUNT = 7  # sums of each way and size, the first of which is not counted
LONG_S = 0.05  # a sum that takes longer is tried only once more
HOPELESS = 2  # times the best so far: not tried again
BUDGET_S = 4.0  # for all


class Combine:
    """Sums flat float32 arrays over the ranks of a mesh, each size in its way."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._ways = [(ALWAYS, ALGORITHMS["star"])]

    def use(self, ways: Sequence[tuple[int, str]]) -> None:
        self._ways = [(size, ALL[name]) for size, name in ways]

    def __call__(self, part: Array) -> None:
        if self.mesh.size > 1:
            way = next(way for size, way in self._ways if part.nbytes <= size)
            way(self.mesh, part)


def rehearse(mesh: Mesh, word: Try) -> list[float]:
    """Seconds of each sum."""
    part, times = np.zeros(word.size // 4, np.float32), []
    for _ in range(word.count):
        begun = time.perf_counter()
        ALL[word.way](mesh, part)
        times.append(time.perf_counter() - begun)
    return times


def measure(
    mesh: Mesh,
    say: Callable[[Word], None],
    sizes: Sequence[int],
    ways: Iterable[str] = ALGORITHMS,
) -> tuple[tuple[int, str], ...]:
    """The fastest way up to each of these sizes in bytes, ascending; the last one's from there on.

    `say` tells the other ranks what rank 0 does with them.
    """
    begun = time.perf_counter()
    chosen: list[tuple[int, str]] = []
    for size in sizes:
        seconds: dict[str, float] = {}
        for way in sorted(ways, key=IN_TURN.index):
            if seconds and time.perf_counter() - begun > BUDGET_S:
                break
            trial = Try(way, size, 1)
            say(trial)
            (first,) = rehearse(mesh, trial)
            if seconds and first > LONG_S and first > HOPELESS * min(seconds.values()):
                continue
            trial = Try(way, size, 1 if first > LONG_S else COUNT)
            say(trial)
            seconds[way] = min(rehearse(mesh, trial))  # what it takes undisturbed
        chosen.append((size, min(seconds, key=lambda way: seconds[way])))
    # Between two sizes the way of the nearer one, on the logarithmic scale.
    bounds = [int((a * b) ** 0.5) for (a, _), (b, _) in itertools.pairwise(chosen)]
    return tuple((bound, way) for bound, (_, way) in zip([*bounds, ALWAYS], chosen, strict=True))
