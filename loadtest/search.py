"""The highest rate at which enough requests meet their SLO, as pure decisions.

Rates are doubled until one fails and then bisected. At each rate a sequential test reads requests
in order of their schedule and stops as soon as its interval excludes the wanted share; the tests
may look often, since each look spends its part of the error (α / (k (k + 1)) at look k).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from loadtest.stats import design_effect, wilson, z_value

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOOK_GROWTH = 1.3
_SKIPPED = 0.1  # of a probe's requests at its start: the queue has not filled yet


class Probe(msgspec.Struct):
    """What one rate has shown. `held` is by the interval if `decided`, else by the share itself."""

    rate: float
    scheduled: int
    share: float
    low: float
    high: float
    held: bool
    decided: bool


class Trial:
    """Whether the attainment at one rate is above `share`: told of one request at a time."""

    def __init__(
        self, share: float, *, least: int = 300, most: int = 20_000, confidence: float = 0.95
    ) -> None:
        self._share = share
        self._alpha = 1 - confidence
        self._flags: list[bool] = []
        self._look_at = least
        self._looks = 0
        self._most = most

    def add(self, met: bool) -> bool:
        """Returns whether the trial has ended."""
        self._flags.append(met)
        count = len(self._flags)
        if count < self._look_at and count < self._most:
            return False
        self._looks += 1
        self._look_at = math.ceil(count * _LOOK_GROWTH)
        _, _, low, high = self._interval()
        return low > self._share or high < self._share or count >= self._most

    def probe(self, rate: float) -> Probe:
        """The result, also of a trial that was ended from outside."""
        count, share, low, high = self._interval()
        decided = low > self._share or high < self._share
        return Probe(rate, count, share, low, high, share >= self._share, decided)

    def _interval(self) -> tuple[int, float, float, float]:
        flags = self._flags[round(len(self._flags) * _SKIPPED) :]
        looks = max(1, self._looks)
        z = z_value(1 - self._alpha / (looks * (looks + 1)))
        low, high = wilson(sum(flags), len(flags), z, design_effect(flags))
        return len(flags), sum(flags) / len(flags) if flags else 0.0, low, high


class Search:
    """Which rate to try next, until the bracket is narrow or the probes are spent."""

    def __init__(
        self, share: float, start: float, *, tolerance: float = 0.05, most_probes: int = 12
    ) -> None:
        self._share = share
        self._start = start
        self._tolerance = tolerance
        self._most_probes = most_probes
        self.probes: list[Probe] = []

    @property
    def held(self) -> float | None:
        """The highest rate that held below the lowest that failed."""
        failed = self.failed or math.inf
        return max((p.rate for p in self.probes if p.held and p.rate < failed), default=None)

    @property
    def failed(self) -> float | None:
        return min((p.rate for p in self.probes if not p.held), default=None)

    def next_rate(self) -> float | None:
        low, high = self.held, self.failed
        if len(self.probes) >= self._most_probes:
            return None
        if low is None:
            return self._start if high is None else high / 2
        if high is None:
            return low * 2
        return None if high <= low * (1 + self._tolerance) else math.sqrt(low * high)

    def tell(self, probe: Probe) -> None:
        self.probes.append(probe)

    @property
    def capacity(self) -> float | None:
        """Where the attainment crosses the share: DistServe's linear interpolation, on the logit
        of attainment between the two ends of the bracket. None when no rate held."""
        return crossing(self.probes, self._share)


def crossing(probes: Iterable[Probe], share: float) -> float | None:
    """The rate at which attainment falls through `share`, between the nearest probes about it."""
    ordered = sorted(probes, key=lambda probe: probe.rate)
    failed = next((probe for probe in ordered if not probe.held), None)
    held = [p for p in ordered if p.held and (failed is None or p.rate < failed.rate)]
    if not held:
        return None
    if failed is None:
        return held[-1].rate
    above, below = (_logit(probe) - math.log(share / (1 - share)) for probe in (held[-1], failed))
    if above <= below:
        return held[-1].rate
    part = min(1.0, max(0.0, above / (above - below)))
    return held[-1].rate * math.exp(part * math.log(failed.rate / held[-1].rate))


def _logit(probe: Probe) -> float:
    """With half a request on either side, so that all or none is finite (Haldane's correction)."""
    met = probe.share * probe.scheduled
    return math.log((met + 0.5) / (probe.scheduled - met + 0.5))
