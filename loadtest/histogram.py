"""A histogram that merges over client processes and keeps its relative error at every quantile.

Buckets grow geometrically, so any quantile is within 0.5 % of a true value (DDSketch, Masson et
al., VLDB 2019, section 2.1), at some hundred buckets however many values there were.
"""

from __future__ import annotations

import math

import msgspec

_GROWTH = 1.01
_SCALE = 1 / math.log(_GROWTH)
_FLOOR = 1e-6  # seconds; all below is one bucket: the clock tells no more


class Histogram(msgspec.Struct):
    """Counts of values in seconds: `buckets[i]` holds (1.01 ** (i - 1), 1.01 ** i]."""

    buckets: dict[int, int] = {}
    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, value: float, times: int = 1) -> None:
        bucket = math.ceil(math.log(value if value > _FLOOR else _FLOOR) * _SCALE)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + times
        self.count += times
        self.total += value * times
        if value > self.largest:
            self.largest = value

    def merge(self, other: Histogram) -> None:
        for bucket, times in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + times
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    def quantile(self, share: float) -> float:
        """The value that `share` of all do not exceed; 0 when there are none."""
        wanted = max(1, math.ceil(share * self.count))
        for bucket, below in self.cumulative():
            if below >= wanted:
                return min(_middle(bucket), self.largest)
        return 0.0

    def cumulative(self) -> list[tuple[int, int]]:
        """(bucket, how many values lie in it or below), ascending."""
        below = 0
        out = []
        for bucket in sorted(self.buckets):
            below += self.buckets[bucket]
            out.append((bucket, below))
        return out

    def cdf(self) -> list[tuple[float, float]]:
        """(seconds, share of values up to it), ascending."""
        return [(_GROWTH**bucket, below / self.count) for bucket, below in self.cumulative()]

    def values(self) -> list[tuple[float, int]]:
        """(seconds, how many), ascending."""
        return [(_middle(bucket), self.buckets[bucket]) for bucket in sorted(self.buckets)]

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


def _middle(bucket: int) -> float:
    """The value of the bucket whose relative error is least at both its ends."""
    return 2 * _GROWTH**bucket / (1 + _GROWTH)
