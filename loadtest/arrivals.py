"""When requests arrive: processes with a rate in requests per second, seeded.

Every process yields absolute times from 0, ascending and without end; `until` cuts them. A time is
drawn from `rng` alone, so the same seed gives the same times.
"""

from __future__ import annotations

import itertools
import math
import statistics
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Literal

import msgspec

from loadtest.errors import OptionError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

Process = Literal["constant", "poisson", "gamma", "on-off", "ramp", "step"]

# The moment CV of n gamma gaps scatters widely above CV 3 (by some 4 % of itself at CV 5 and
# n = 10,000), so a schedule whose realised CV is off by more than this is drawn anew.
_CV_TOLERANCE = 0.05
_CV_TOLERANCE_AT = 10_000
_REDRAWS = 100


class Arrivals(msgspec.Struct, frozen=True):
    """`rate` is the mean in requests/s; `to_rate` is reached after `change` seconds."""

    process: Process = "poisson"
    rate: float = 1.0
    cv: float = 1.0  # gamma: coefficient of variation of the gaps; 1 is Poisson
    on: float = 1.0  # on-off: mean seconds of each phase, exponential
    off: float = 1.0
    to_rate: float = 1.0  # ramp, step
    change: float = 60.0

    def __str__(self) -> str:
        detail = {
            "gamma": f", CV {self.cv:g}",
            "on-off": f", {self.on:g} s on, {self.off:g} s off",
            "ramp": f" to {self.to_rate:g}/s within {self.change:g} s",
            "step": f", {self.to_rate:g}/s from {self.change:g} s on",
        }
        return f"{self.process} {self.rate:g}/s{detail.get(self.process, '')}"


def schedule(
    arrivals: Arrivals, rng: random.Random, *, count: int | None, duration: float | None
) -> array[float]:
    """The times of `count` arrivals, or of those within `duration` seconds, whichever ends first.

    Raises OptionError when neither is given.
    """
    if count is None and duration is None:
        raise OptionError("--requests", "give --requests or --duration: these arrivals never end")
    times = _cut(arrivals, rng, count, duration)
    if arrivals.process != "gamma" or arrivals.cv <= 1:
        return times
    for _ in range(_REDRAWS):
        tolerance = _CV_TOLERANCE * max(1.0, math.sqrt(_CV_TOLERANCE_AT / max(1, len(times))))
        if abs(realised(times).cv / arrivals.cv - 1) <= tolerance:
            break
        times = _cut(arrivals, rng, count, duration)
    return times


def _cut(
    arrivals: Arrivals, rng: random.Random, count: int | None, duration: float | None
) -> array[float]:
    times = _PROCESSES[arrivals.process](arrivals, rng)
    if duration is not None:
        times = itertools.takewhile(lambda at: at < duration, times)
    return array("d", itertools.islice(times, count))


def _constant(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    return (index / arrivals.rate for index in itertools.count())


def _poisson(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    return itertools.accumulate(rng.expovariate(arrivals.rate) for _ in itertools.repeat(None))


def _gamma(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    shape = 1 / arrivals.cv**2
    scale = 1 / (arrivals.rate * shape)
    return itertools.accumulate(rng.gammavariate(shape, scale) for _ in itertools.repeat(None))


def _on_off(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    """Poisson while on, silent while off: a two-state MMPP whose mean is `rate`."""
    rate = arrivals.rate * (arrivals.on + arrivals.off) / arrivals.on
    begin = 0.0
    while True:
        end = begin + rng.expovariate(1 / arrivals.on)
        at = begin + rng.expovariate(rate)
        while at < end:
            yield at
            at += rng.expovariate(rate)
        begin = end + rng.expovariate(1 / arrivals.off)


def _ramp(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    """Poisson whose rate grows linearly and then stays, by inverting its expected count."""
    start, end, change = arrivals.rate, arrivals.to_rate, arrivals.change
    slope = (end - start) / change
    ramped = (start + end) / 2 * change
    for expected in itertools.accumulate(rng.expovariate(1) for _ in itertools.repeat(None)):
        if expected >= ramped:
            yield change + (expected - ramped) / end
        else:  # start t + slope t²/2 = expected, in the form that is stable for a small slope
            yield 2 * expected / (start + math.sqrt(start**2 + 2 * slope * expected))


def _step(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    before = arrivals.rate * arrivals.change
    for expected in itertools.accumulate(rng.expovariate(1) for _ in itertools.repeat(None)):
        if expected < before:
            yield expected / arrivals.rate
        else:
            yield arrivals.change + (expected - before) / arrivals.to_rate


_PROCESSES = {
    "constant": _constant,
    "poisson": _poisson,
    "gamma": _gamma,
    "on-off": _on_off,
    "ramp": _ramp,
    "step": _step,
}


class Realised(msgspec.Struct):
    """What a schedule turned out to be."""

    count: int = 0
    seconds: float = 0.0  # first to last arrival
    rate: float = 0.0
    cv: float = 0.0  # of the gaps
    dispersion: float = 0.0  # variance / mean of the counts per second; 1 is Poisson


def realised(times: array[float]) -> Realised:
    if len(times) < 3 or times[-1] <= times[0]:
        return Realised(count=len(times))
    span = times[-1] - times[0]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = span / len(gaps)
    counts = Counter(int(at - times[0]) for at in times)
    whole = int(span)  # the last second is not a whole one
    dispersion = 0.0
    if whole > 1:
        per_second = [counts[second] for second in range(whole)]
        dispersion = statistics.pvariance(per_second) / (statistics.fmean(per_second) or 1.0)
    return Realised(
        count=len(times),
        seconds=span,
        rate=len(gaps) / span,
        cv=statistics.pstdev(gaps, mean) / mean,
        dispersion=dispersion,
    )
