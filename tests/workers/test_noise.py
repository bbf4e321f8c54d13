"""The noise of draws, and that the race among few finds who wins it among all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.noise import STEPS, Noise, winner


def noise_of(*arguments):
    noise = Noise()
    noise.seek(*arguments)
    return noise


def exponentials(arguments, vocab):
    """E of every token."""
    noise = noise_of(*arguments)
    return noise.exponential(noise.coarse(vocab), np.arange(vocab))


def test_noise_is_the_same_for_ever():
    expected = [0.23098025663062594, 0.4574273638902156, 0.8475972685473583]
    assert exponentials((7, 1, 2, 3), 3) == pytest.approx(expected, rel=1e-12)


def test_noise_is_told_apart_by_each_of_its_arguments():
    base = (7, 1, 2, 3)
    others = [(8, 1, 2, 3), (7, 2, 2, 3), (7, 1, 3, 3), (7, 1, 2, 4), (1, 7, 2, 3), (7, 1, 3, 2)]
    streams = {exponentials(arguments, 4).tobytes() for arguments in [base, *others]}
    assert len(streams) == 1 + len(others)


def test_a_token_has_its_noise_whoever_is_asked_for_beside_it():
    every = exponentials((7, 1, 2, 3), 1001)
    noise = noise_of(7, 1, 2, 3)
    some = np.array([990, 3, 17, 16])
    coarse = noise.coarse(1001)
    assert np.array_equal(noise.coarse(10), coarse[:10])
    assert np.array_equal(noise.exponential(coarse[some], some), every[some])


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63), 2**70])
def test_noise_is_exponential_for_any_seed(seed):
    times = np.sort(exponentials((seed, 0, 0, 0), 4000))
    assert 0 < times[0] < 1e-2
    assert np.isfinite(times[-1])
    distance = np.abs(1 - np.exp(-times) - np.arange(4000) / 4000).max()
    assert distance < 1.95 / 4000**0.5  # Kolmogorov-Smirnov: 1 in 1,000


@pytest.mark.parametrize("coarse", [0, 1, 65535])
def test_the_coarse_bits_bound_the_noise(coarse):
    times = noise_of(1, 0, 0, 0).exponential(np.full(50, coarse, np.uint16), np.arange(50))
    values = -np.expm1(-times) * STEPS
    assert (values > coarse).all()
    assert (values < coarse + 1).all()
    assert len(set(times)) == 50


@settings(max_examples=150, deadline=None)
@given(
    spread=st.sampled_from([0.0, 0.5, 3.0, 12.0, 100.0]),
    shift=st.sampled_from([0.0, 30.0, -5000.0]),
    temperature=st.sampled_from([1e-300, 0.05, 0.7, 1.0, 3.0, 1e9, 1e300]),
    vocab=st.sampled_from([1, 2, 15, 16, 17, 700]),
    dtype=st.sampled_from([np.float32, np.float64]),
    forbidden=st.booleans(),
    some=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_winner_is_who_arrives_first_among_all(
    spread, shift, temperature, vocab, dtype, forbidden, some, seed
):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(0, spread, vocab) + shift).astype(dtype)
    if forbidden:
        logits[rng.random(vocab) < 0.5] = -np.inf
        logits[vocab // 2] = shift
    ids = np.flatnonzero(rng.random(vocab) < 0.3) if some else np.arange(vocab)
    ids = ids if np.isfinite(logits[ids]).any() else np.array([vocab // 2])
    with np.errstate(all="ignore"):
        below = logits[ids].astype(np.float64) - float(logits[ids].max())
        times = exponentials((seed, 0, 0, 9), vocab)[ids] / np.exp(below / temperature)
    found = winner(noise_of(seed, 0, 0, 9), logits, temperature, ids if some else None)
    assert found == ids[times.argmin()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_of_no_numbers_still_gives_a_token(value):
    row = np.full(300, value, np.float32)
    assert 0 <= winner(noise_of(1, 0, 0, 0), row, 1.0) < 300


def test_unlikely_tokens_win_as_often_as_they_should():
    """One likely token, and 4,000 that weigh a hundredth of it together."""
    logits, draws, noise, won = np.full(4001, -np.log(400_000), np.float32), 20_000, Noise(), 0
    logits[1234] = 0
    for position in range(draws):
        noise.seek(5, 0, 0, position)
        won += winner(noise, logits, 1.0) != 1234
    assert abs(won - draws / 101) < 3.3 * (draws / 101) ** 0.5  # 1 in 1,000
