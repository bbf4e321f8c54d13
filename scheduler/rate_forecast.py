"""How many requests come in the next windows: the forecast that has lately been least wrong.

Three of them run beside each other: the last window, its trend, and yesterday at this hour times
how today compares so far. Each one's past errors are known, because each is asked in every window;
the margin above the best one is a quantile of its own errors, not an assumption.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

Source = Literal["last window", "trend", "day before"]

DAY_S = 86_400.0
TREND = 3  # windows that a trend is taken from
LEVEL_S = 3600.0  # today is compared with yesterday over so long
ERRORS_S = DAY_S  # errors are remembered for so long: what comes once a day counts too
ENOUGH = 6  # errors from which a quantile is taken; before that there is no margin
WILD = 4.0  # times: an error beyond is an outage, or its end
LEAST = 1e-3  # requests/s: nobody is planned for none at all


class Forecast(msgspec.Struct, frozen=True):
    """In requests/s, the highest window of those asked for: the best guess, and with its margin.

    `error`: what the source was off by on the mean, as a share; 0 before it is known.
    """

    rate: float
    upper: float
    source: Source
    error: float


class RateForecast:
    """Of one model. `ahead`: for the highest of so many next windows; `share` of them it covers."""

    def __init__(self, window_s: float, ahead: int, share: float) -> None:
        self._ahead = ahead
        self._share = share
        self._day = round(DAY_S / window_s)
        self._level = max(1, round(LEVEL_S / window_s))
        self._seen: list[float] = []
        self._asked: deque[dict[Source, float]] = deque(maxlen=ahead)  # oldest first
        most = max(ENOUGH, round(ERRORS_S / window_s))
        self._errors: dict[Source, deque[float]] = {
            source: deque(maxlen=most) for source in ("last window", "trend", "day before")
        }

    def learn(self, rate: float) -> Forecast:
        """One more window is over; what the next ones bring."""
        self._seen.append(max(rate, LEAST))
        if len(self._asked) == self._ahead:
            came = max(self._seen[-self._ahead :])
            for source, guess in self._asked[0].items():
                error = math.log(came / guess)
                self._errors[source].append(max(-math.log(WILD), min(math.log(WILD), error)))
        guesses = self._guesses()
        self._asked.append(guesses)
        del self._seen[: -2 * self._day]
        source = min(guesses, key=self._wrong)
        error = self._wrong(source)
        return Forecast(
            guesses[source],
            guesses[source] * self._margin(source),
            source,
            math.expm1(error) if error < math.inf else 0.0,
        )

    def _guesses(self) -> dict[Source, float]:
        seen, ahead = self._seen, self._ahead
        guesses: dict[Source, float] = {"last window": seen[-1]}
        if len(seen) > TREND:
            slope = (seen[-1] - seen[-1 - TREND]) / TREND
            # Half of it: trends end.
            guesses["trend"] = max(seen[-1] / WILD, seen[-1] + slope * ahead / 2)
        if len(seen) >= self._day + self._level:
            before = seen[-self._day : len(seen) - self._day + ahead]
            then = seen[-self._day - self._level : -self._day]
            level = sum(seen[-self._level :]) / sum(then)
            guesses["day before"] = max(before) * min(WILD, max(1 / WILD, level))
        return guesses

    def _wrong(self, source: Source) -> float:
        """Mean distance of its logarithm; infinite before it is known."""
        errors = self._errors[source]
        return sum(map(abs, errors)) / len(errors) if len(errors) >= ENOUGH else math.inf

    def _margin(self, source: Source) -> float:
        errors = self._errors[source]
        return math.exp(quantile(errors, self._share)) if len(errors) >= ENOUGH else 1.0


def quantile(values: Sequence[float] | deque[float], share: float) -> float:
    """The least of them that is at least as large as `share` of them."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)]
