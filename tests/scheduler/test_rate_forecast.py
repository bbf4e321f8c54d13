"""The forecast of rates covers the share that it says, by its own past errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scheduler.rate_curve import DAY_S, built_in
from scheduler.rate_forecast import ENOUGH, LEAST, RateForecast, quantile

WINDOW_S = 600.0
DAY = round(DAY_S / WINDOW_S)


def said(rates, share=0.8, ahead=2):
    forecast = RateForecast(WINDOW_S, ahead, share)
    return [forecast.learn(rate) for rate in rates]


def came(rates, ahead=2):
    """The highest of the next windows, after each."""
    return [max(rates[at + 1 : at + 1 + ahead]) for at in range(len(rates) - ahead)]


def test_a_constant_rate_is_forecast_as_it_is():
    assert {(each.rate, each.upper) for each in said([7.0] * 300)} == {(7.0, 7.0)}


def test_before_its_errors_are_known_there_is_no_margin():
    assert [each.upper for each in said([1, 2, 3, 4])] == [1, 2, 3, 4]


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_the_margin_covers_the_share_it_is_asked_for(share):
    rng = np.random.default_rng(3)
    rates = (10 * np.exp(np.cumsum(rng.normal(0, 0.05, 2000)))).tolist()
    forecasts = said(rates, share)
    covered = [each.upper >= high for each, high in zip(forecasts, came(rates), strict=False)]
    assert np.mean(covered[100:]) == pytest.approx(share, abs=0.04)


def test_a_steady_climb_is_best_told_by_its_trend():
    rates = [10 + 0.5 * at for at in range(60)]
    assert said(rates)[-1].source == "trend"


def test_a_day_like_the_one_before_is_best_told_by_that_one_and_its_level():
    shape = [10 + (40 if 60 <= at < 66 or 100 <= at < 103 else 0) for at in range(DAY)]
    rates = [*shape, *(1.2 * rate for rate in shape), *(1.2 * rate for rate in shape)]
    last = said(rates)[2 * DAY + 30 :]
    assert last[0].source == "day before"
    assert last[60 - 30 - 1].rate == pytest.approx(1.2 * 50)


def test_the_error_is_that_of_the_source_on_the_windows_that_came():
    rates = [10.0, 20.0] * 40
    forecast = said(rates, ahead=1)[-1]
    assert forecast.error == pytest.approx(1.0)
    assert forecast.upper == 40.0


def test_an_outage_and_its_end_do_not_widen_the_margin_for_ever():
    rates = [10.0] * 60 + [0.0] * 6 + [10.0] * 60
    assert said(rates)[-1].upper == 10.0
    assert said(rates)[62].rate == LEAST


def test_over_a_day_it_is_at_most_little_worse_than_the_last_window():
    curve = built_in(3, np.random.default_rng(1))
    rates = np.interp(np.arange(0, 3 * DAY_S, WINDOW_S), curve.times, curve.rates).tolist()
    forecasts, high = said(rates), came(rates)
    wrong = [abs(math.log(f.rate / h)) for f, h in zip(forecasts, high, strict=False)]
    naive = [abs(math.log(r / h)) for r, h in zip(rates, high, strict=False)]
    assert sum(wrong[2 * DAY :]) < 1.05 * sum(naive[2 * DAY :])


def test_a_quantile_covers_its_share():
    assert [quantile([3, 1, 2, 4], share) for share in (0.01, 0.25, 0.5, 0.75, 1)] == [
        1,
        1,
        2,
        3,
        4,
    ]
    assert ENOUGH > 1
