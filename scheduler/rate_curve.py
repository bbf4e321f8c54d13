"""How a rate goes up and down over days, and requests that follow it."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from scheduler.errors import SetupError
from scheduler.workload import Arrival

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

DAY_S = 86_400.0
STEP_S = 300.0
# The built-in day is assumed, not measured: two harmonics, with the trough at 4:30 and the peak at
# 15:00, three times the trough; slow noise that forgets half of itself in 20 minutes; and a burst.
HARMONICS = ((0.45, 15.0, 24.0), (0.12, 10.5, 12.0))  # share of the mean, hour of the peak, period
NOISE, MEMORY = 0.05, 0.84
BURST = (20.0, 20.5, 1.5)  # from hour, to hour, times


class Curve(msgspec.Struct, frozen=True):
    """`rates` in requests/s at `times` in s, linear in between."""

    times: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.trapezoid(self.rates, self.times)) / (self.times[-1] - self.times[0])

    def scaled(self, mean: float) -> Curve:
        factor = mean / self.mean
        return Curve(self.times, tuple(rate * factor for rate in self.rates))

    def cut(self, start: float, end: float) -> Curve:
        """The part between two times, which becomes its own time 0."""
        inside = [time for time in self.times if start < time < end]
        times = [start, *inside, end]
        rates = np.interp(times, self.times, self.rates).tolist()
        return Curve(tuple(time - start for time in times), tuple(rates))


def built_in(days: int, rng: np.random.Generator) -> Curve:
    """Days alike but for their noise, around a mean of 1; the burst is on the last one."""
    times = np.arange(0.0, days * DAY_S + STEP_S, STEP_S)
    hours = times / 3600
    rates = np.ones_like(times)
    for share, peak, period in HARMONICS:
        rates += share * np.cos(2 * math.pi * (hours - peak) / period)
    noise = np.empty_like(times)
    level = 0.0
    for at, drawn in enumerate(rng.normal(0.0, NOISE * math.sqrt(1 - MEMORY**2), len(times))):
        level = MEMORY * level + drawn
        noise[at] = level
    start, end, factor = BURST
    last = 24.0 * (days - 1)
    rates *= np.exp(noise)
    rates[(hours >= last + start) & (hours < last + end)] *= factor
    return Curve(tuple(times.tolist()), tuple(rates.tolist()))


def read_curves(paths: Sequence[Path]) -> Curve:
    """The sum of CSV files: seconds, requests/s; further fields and a first line of names are not
    looked at. Raises SetupError naming the file and the line."""
    total: dict[float, float] = {}
    for path in paths:
        try:
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(f"{path}: {error}") from None
        for number, row in enumerate(rows, 1):
            try:
                time, rate = float(row[0]), float(row[1])
                if not (math.isfinite(time) and math.isfinite(rate) and rate >= 0):
                    raise ValueError(f"{time:g}, {rate:g} is no time and rate")
            except (IndexError, ValueError) as error:
                if number == 1 or not row:
                    continue
                raise SetupError(f"{path}: line {number}: {error}") from None
            total[time] = total.get(time, 0.0) + rate
    times = tuple(sorted(total))
    if len(times) < 2 or not any(total.values()):
        raise SetupError(f"{', '.join(map(str, paths))}: fewer than two rates above 0")
    return Curve(times, tuple(total[time] for time in times))


def draw(
    sizes: Sequence[Arrival], curve: Curve, cv: float, rng: np.random.Generator
) -> list[Arrival]:
    """Requests along the curve, in order, from time 0; their sizes drawn from `sizes`.

    Gaps have a standard deviation of `cv` times their mean: 1 is Poisson, more is bursty.
    """
    times, rates = np.array(curve.times), np.array(curve.rates)
    passed = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(times))])
    moments = _moments(cv, float(passed[-1]), rng)
    # The time by which so many requests have come on the mean: linear between fine steps.
    fine = np.arange(times[0], times[-1] + 1.0, 1.0)
    come = np.interp(fine, times, rates).cumsum()
    come = np.concatenate([[0.0], come[:-1]])
    at = np.interp(moments * (come[-1] / passed[-1]), come, fine)
    chosen = rng.integers(0, len(sizes), len(at))
    return [
        Arrival(time, sizes[number].input, sizes[number].output)
        for time, number in zip(at.tolist(), chosen.tolist(), strict=True)
    ]


def _moments(cv: float, until: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Of a process of rate 1."""
    shape = cv**-2
    count = math.ceil(until + 6 * cv * math.sqrt(until) + 10)
    moments = np.cumsum(rng.gamma(shape, 1 / shape, count))
    return np.asarray(moments[moments < until])
