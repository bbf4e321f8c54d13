"""How much of its replicas a pool may be loaded with, so that chance does not break the SLO.

Requests on k replicas of n places each are about Poisson: to fit them into k·n places in the share
of time that the SLO asks for, utilisation ρ must leave z standard deviations free,
ρ + z·√(ρ/(k·n)) ≤ 1. A column's `burst` is z/√n, times the root of the arrivals' dispersion.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def usable(replicas: float, burst: float) -> float:
    """How many replicas' capacity `replicas` of them may be loaded with: ρ·k."""
    if burst == 0 or replicas <= 0:
        return max(0.0, replicas)
    spread = burst / math.sqrt(replicas)
    return replicas * ((math.sqrt(spread * spread + 4) - spread) / 2) ** 2


def enough(load: float, burst: float) -> int:
    """The fewest replicas that are usable for `load` replicas' capacity."""
    count = math.ceil(load)
    while usable(count, burst) < load:
        count += max(1, math.floor(load - usable(count, burst)))
    return count


def ranges(most: int) -> Iterable[tuple[int, int]]:
    """1, 2, 3, 4, then in steps of about a half: 5-6, 7-8, 9-12, 13-16, 17-24, …"""
    low, step = 1, 1
    while low <= most:
        high = min(low + step - 1, most)
        yield low, high
        low = high + 1
        if low > 4:
            step = 2 ** (low.bit_length() - 2)


def line_below(low: int, high: int, burst: float, lost: int) -> tuple[float, float]:
    """Start and slope of a line that is at most `usable(count - lost)` on low..high."""
    points = [usable(count - lost, burst) for count in range(low, high + 1)]
    slope = (points[-1] - points[0]) / (high - low)
    return min(p - slope * count for count, p in enumerate(points, low)), slope
