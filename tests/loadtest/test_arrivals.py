from __future__ import annotations

import random

import pytest

from loadtest.arrivals import Arrivals, realised, schedule
from loadtest.errors import OptionError


def drawn(arrivals: Arrivals, seed: int = 1, count: int | None = 10_000, duration=None):
    return schedule(arrivals, random.Random(seed), count=count, duration=duration)


@pytest.mark.parametrize("cv", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_gamma_gaps_realise_the_asked_cv_within_5_percent(cv, seed):
    found = realised(drawn(Arrivals("gamma", rate=10, cv=cv), seed))
    assert found.cv == pytest.approx(cv, rel=0.05)
    assert found.rate == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize(
    ("arrivals", "rate"),
    [
        (Arrivals("constant", rate=7), 7),
        (Arrivals("poisson", rate=7), 7),
        (Arrivals("gamma", rate=7, cv=0.5), 7),
        (Arrivals("on-off", rate=7, on=0.2, off=0.3), 7),
        (Arrivals("ramp", rate=5, to_rate=9, change=1e9), 5),
        (Arrivals("step", rate=1e9, to_rate=7, change=1e-9), 7),
    ],
)
def test_the_mean_rate_is_the_asked_one(arrivals, rate):
    assert realised(drawn(arrivals)).rate == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("process", ["constant", "poisson", "gamma", "on-off", "ramp", "step"])
def test_the_same_seed_gives_the_same_times_and_another_seed_others(process):
    arrivals = Arrivals(process, rate=20, cv=2, to_rate=40, change=10)
    assert drawn(arrivals, 3, 500) == drawn(arrivals, 3, 500)
    assert (drawn(arrivals, 3, 500) != drawn(arrivals, 4, 500)) == (process != "constant")
    assert list(drawn(arrivals, 3, 500)) == sorted(drawn(arrivals, 3, 500))


def test_constant_arrivals_have_no_variance_and_poisson_has_its_own():
    assert realised(drawn(Arrivals("constant", rate=10))).cv == pytest.approx(0, abs=1e-9)
    poisson = realised(drawn(Arrivals("poisson", rate=10)))
    assert poisson.cv == pytest.approx(1, rel=0.05)
    assert poisson.dispersion == pytest.approx(1, rel=0.15)


def test_on_off_arrivals_burst():
    assert realised(drawn(Arrivals("on-off", rate=50, on=5, off=5))).dispersion > 10


def test_a_ramp_reaches_its_rate_and_stays():
    times = drawn(Arrivals("ramp", rate=10, to_rate=100, change=100), count=None, duration=200)
    per_stretch = [sum(a <= t < a + 50 for t in times) / 50 for a in (0, 50, 100, 150)]
    assert per_stretch == pytest.approx([32.5, 77.5, 100, 100], rel=0.1)


def test_a_step_changes_the_rate_at_its_time():
    times = drawn(Arrivals("step", rate=10, to_rate=100, change=50), count=None, duration=100)
    assert sum(t < 50 for t in times) == pytest.approx(500, rel=0.15)
    assert sum(t >= 50 for t in times) == pytest.approx(5000, rel=0.05)


def test_whichever_of_count_and_duration_ends_first_ends_the_schedule():
    arrivals = Arrivals("constant", rate=10)
    assert len(drawn(arrivals, count=5, duration=100)) == 5
    assert len(drawn(arrivals, count=500, duration=1)) == 10


def test_arrivals_without_an_end_are_refused():
    with pytest.raises(OptionError, match="--requests"):
        drawn(Arrivals(), count=None)
