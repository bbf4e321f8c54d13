"""What is measured of forecasts is what is known of the trace."""

from __future__ import annotations

import pytest

from bench.forecast import measure
from scheduler.rate_curve import Curve

DAY = 144


def of(rates, window=600.0):
    times = tuple(window * at for at in range(len(rates)))
    return measure(Curve(times, tuple(map(float, rates))), window, 2, 0.8)


def test_a_constant_rate_is_never_missed_and_always_covered():
    found = of([5] * 2 * DAY)
    assert found["errors"]["forecast"] == (0.0, 0.0)
    assert (found["covered"], found["windows"]) == (1.0, DAY - 2)


def test_twice_the_day_before_is_half_of_it():
    found = of([5] * DAY + [10] * DAY)
    assert found["errors"]["day before"][0] == pytest.approx(0.5)


def test_outages_are_left_out():
    assert of([5] * DAY + [0] * 72 + [5] * 72)["windows"] == DAY - 2 - 70


def test_less_than_a_day_says_nothing():
    with pytest.raises(SystemExit, match="more than a day"):
        of([5] * DAY)
