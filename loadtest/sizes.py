"""How long prompts and answers are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from loadtest.errors import OptionError
from loadtest.units import number

if TYPE_CHECKING:
    import random

_TOKENS_LIMIT = 10_000_000


class Sizes(msgspec.Struct, frozen=True):
    """Tokens: uniform from `low` to `high`, or log-normal of this `mean` and `cv` within them."""

    low: int
    high: int
    mean: float = 0.0
    cv: float = 0.0

    def draw(self, rng: random.Random) -> int:
        if not self.cv:
            return self.low if self.low == self.high else rng.randint(self.low, self.high)
        variance = math.log(1 + self.cv**2)
        size = rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return min(max(round(size), self.low), self.high)


def parse(text: str, option: str) -> Sizes:
    """`64`, `20-60`, or `lognormal:MEAN:CV` with at most ten times the mean."""
    if text.startswith("lognormal:"):
        mean, _, cv = text.removeprefix("lognormal:").partition(":")
        value = number(mean, option)
        return Sizes(1, round(10 * value), value, number(cv, option))
    low, dash, high = text.partition("-")
    lowest = _tokens(low, option)
    highest = _tokens(high, option) if dash else lowest
    if highest < lowest:
        raise OptionError(option, f"{text!r}: the first number is the smaller one")
    return Sizes(lowest, highest)


def _tokens(text: str, option: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) <= _TOKENS_LIMIT:
        raise OptionError(option, f"{text!r} is not 64, 20-60 or lognormal:MEAN:CV tokens")
    return int(text)
