"""A plan's prices and shares as routing carries them out: cheapest first, each as far as planned.

The plan sends a share x of a bucket's r requests/s to a column, whose replicas are due r·x of them
together. As long as they get no more, a second on them has the plan's price; u times as many, and
it counts u^STEEP times as much. Among the workers that are in time the cheapest comes first. So at
the planned rate the plan's shares come true; at a lower one the dearest stay idle; at a higher one
all take more in proportion.

A router knows a prompt's size and not its answer's, so buckets of one input size are one here.
"""

from __future__ import annotations

import bisect
import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler.workload import INPUT_EDGES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WINDOW_S = 30.0  # over which what a column gets is counted: older requests weigh less and less
STEEP = 64.0  # prices that are 4 apart are outweighed by 2 % more than is due
MOST = 1e4  # times what is due; also where nothing is
ALIKE = 1.25  # costs that are nearer count as one: predictions err, and then queues decide
PER_E = 1 / math.log(ALIKE)
NOTHING = -sys.maxsize
HOUR_S = 3600.0


class PlannedBucket(NamedTuple):
    """`tokens` of a prompt, on the mean; `rate` in requests/s."""

    name: str
    model: str
    tokens: float
    rate: float


class Planned(msgspec.Struct, frozen=True):
    """What a plan wants of one column.

    `price` of a second on one replica, in $; `rates` in requests/s of all together,
    by `size_class`.
    """

    price: float
    rates: tuple[float, ...] = (0.0,) * (len(INPUT_EDGES) + 1)


def size_class(tokens: float) -> int:
    """Of a prompt: that of its bucket in a plan."""
    return bisect.bisect_left(INPUT_EDGES, tokens)


def planned(
    buckets: Iterable[PlannedBucket],
    routing: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, tuple[str, float]],
) -> dict[str, Planned]:
    """By column. `columns`: each one's model and $/h of a replica."""
    due = {name: [0.0] * (len(INPUT_EDGES) + 1) for name in columns}
    for bucket in buckets:
        for name, share in routing.get(bucket.name, {}).items():
            if name in columns and columns[name][0] == bucket.model:
                due[name][size_class(bucket.tokens)] += bucket.rate * share
    return {name: Planned(columns[name][1] / HOUR_S, tuple(rates)) for name, rates in due.items()}


def rounded(cost: float) -> int:
    """Of 0 or more. Costs that are about alike give one number, dearer ones a higher one."""
    return math.floor(math.log(cost) * PER_E) if cost else NOTHING


@dataclass(eq=False, slots=True)
class Allowance:
    """Of one column: what it got lately beside what it is due, by size of prompt."""

    plan: Planned
    _got: list[float] = field(init=False)  # requests, each counted less the longer ago it came
    _at: list[float] = field(init=False)  # when they were last counted

    def __post_init__(self) -> None:
        # As if what is due had always come: at the planned rate shares are right from the start.
        self._got = [rate * WINDOW_S for rate in self.plan.rates]
        self._at = [0.0] * len(self._got)

    def price(self, tokens: int, now: float) -> float:
        """Of a second on one of its workers, for a prompt of so many tokens."""
        at = size_class(tokens)
        due = self.plan.rates[at] * WINDOW_S
        beyond = self._now(at, now) / max(due, 1.0) if due else MOST
        return self.plan.price * math.pow(max(1.0, min(beyond, MOST)), STEEP)

    def take(self, tokens: int, share: float, now: float) -> None:
        """One of its workers gets such a share of a request with such a prompt."""
        at = size_class(tokens)
        self._got[at] = self._now(at, now) + share
        self._at[at] = now

    def _now(self, at: int, now: float) -> float:
        return self._got[at] * math.exp((self._at[at] - now) / WINDOW_S)
