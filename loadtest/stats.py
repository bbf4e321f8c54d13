"""Estimates that say how sure they are, for requests that wait behind each other."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

_BATCHES = 30
_LEAST_BATCHED = 4 * _BATCHES


def z_value(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 at 0.95."""
    return statistics.NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(met: int, count: int, z: float, design: float = 1.0) -> tuple[float, float]:
    """Wilson's score interval for a share, `count` being worth `count / design` trials."""
    if not count:
        return 0.0, 1.0
    trials = count / design
    share = met / count
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def design_effect(flags: Sequence[bool]) -> float:
    """How many requests in order of time are worth one independent trial; at least 1.

    Requests in one busy period share its luck. The variance of batch means, compared with that of
    independent trials, says by how much (batch means: Law, Simulation Modeling, section 9.5). Where
    neighbouring batches still resemble each other by r, the factor of an AR(1) process is added.
    """
    share = sum(flags) / len(flags) if flags else 0.0
    if len(flags) < _LEAST_BATCHED or share in (0.0, 1.0):
        return 1.0
    size = len(flags) // _BATCHES
    means = [sum(flags[at * size : (at + 1) * size]) / size for at in range(_BATCHES)]
    alike = max(0.0, statistics.correlation(means[:-1], means[1:])) if len(set(means)) > 2 else 0.0
    inflation = (1 + alike) / (1 - min(alike, 0.95))
    return max(1.0, statistics.variance(means) * size / (share * (1 - share)) * inflation)


def warmup_length(values: Sequence[float], batch: int = 5) -> int:
    """How many values at the start to leave out, by MSER-5 (White, Cobb and Spratt, 2000).

    The cut that makes the standard error of the rest smallest, looked for in the first half.
    """
    means = [
        statistics.fmean(values[at : at + batch]) for at in range(0, len(values) - batch + 1, batch)
    ]
    best, cut = math.inf, 0
    total = squares = 0.0
    for at in range(len(means) - 1, -1, -1):
        total += means[at]
        squares += means[at] ** 2
        kept = len(means) - at
        error = (squares - total * total / kept) / kept**2
        if at <= len(means) // 2 and error <= best:
            best, cut = error, at
    return cut * batch if _differs(values, cut * batch) else 0


def _differs(values: Sequence[float], cut: int) -> bool:
    """MSER always finds some best cut; one that leaves out nothing unusual is noise."""
    if not cut:
        return False
    rest = statistics.fmean(values[cut:])
    return abs(statistics.fmean(values[:cut]) - rest) > 0.1 * rest


class Quantiles(msgspec.Struct):
    """Of values in seconds."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; 0 when there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def quantiles(values: Sequence[float]) -> Quantiles:
    if not values:
        return Quantiles()
    ordered = sorted(values)
    p50, p90, p95, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Quantiles(len(ordered), statistics.fmean(ordered), p50, p90, p95, p99, ordered[-1])
