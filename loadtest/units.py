"""Numbers as people write them: 250ms, 1/16, 20-60. Errors name the option."""

from __future__ import annotations

import math
import re

from loadtest.errors import OptionError

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9.]+(?:e-?[0-9]+)?)\s*(us|ms|s|m|h|)")


def number(text: str, option: str, *, positive: bool = True) -> float:
    """A finite number; `1/16` is one too."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise OptionError(option, f"{text!r} is not a number") from None
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise OptionError(option, f"{text!r} must be {'above' if positive else 'at least'} 0")
    return value


def seconds(text: str, option: str, *, positive: bool = True) -> float:
    """A duration with its unit: `250ms`, `5s`, `2m`; a bare number is seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise OptionError(option, f"{text!r} is not a duration such as 250ms, 5s or 2m")
    return number(match[1], option, positive=positive) * _SECONDS[match[2]]


def seconds_text(value: float) -> str:
    """Three figures that mean something, in the unit that suits."""
    if value == 0:
        return "0"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
