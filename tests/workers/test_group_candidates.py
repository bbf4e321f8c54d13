"""The few logits that travel decide the same tokens as all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.request import Sampling
from workers.group.candidates import pack, packed_bytes, unpack, wanted
from workers.sampling import Draw, Sampler

CUTS = (0, 40, 41, 170, 300)  # rows of the vocabulary of four ranks
VOCAB = CUTS[-1]


def draw(row=0, allowed=None, choice=0, **fields):
    return Draw(row, Sampling(seed=5, **fields), 0, choice, [1, 2, 3], 1, allowed)


def travelled(logits, counts):
    """What rank 0 has of the rows when all other ranks have answered."""
    whole = np.empty_like(logits)
    whole[:, : CUTS[1]] = logits[:, : CUTS[1]]
    sent = 0
    for first, last in itertools.pairwise(CUTS[1:]):
        data = pack(logits[:, first:last], counts)
        assert len(data) == packed_bytes(counts, last - first)
        unpack(memoryview(data), counts, whole[:, first:last])
        sent += len(data)
    return whole, sent


SAMPLINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 40, 250, 10_000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.1]),
        "min_p": st.sampled_from([0.0, 0.2]),
    }
)


@given(st.lists(SAMPLINGS, min_size=1, max_size=4), st.integers(0, 2**32), st.booleans())
def test_tokens_are_the_same(samplings, seed, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=4, size=(len(samplings), VOCAB)).astype(np.float32)
    if ties:
        logits = np.round(logits / 4) * 4
    draws = [
        draw(row, choice=choice, **fields)
        for row, fields in enumerate(samplings)
        for choice in range(2)
    ]
    sparse, _ = travelled(logits, wanted(draws, len(logits)))
    assert Sampler().sample(sparse, draws) == Sampler().sample(logits, draws)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 1.0, "top_k": 40, "top_p": 0.9}, 40),
        ({"temperature": 1.0}, 0),
        ({"temperature": 1.0, "top_p": 0.9}, 0),
        ({"temperature": 0.0, "logprobs": 2}, 0),
        ({"temperature": 0.0, "logit_bias": {7: 1.0}}, 0),
        ({"temperature": 0.0, "presence_penalty": 0.5}, 0),
        ({"temperature": 0.0, "allowed": np.ones(VOCAB, bool)}, 0),
    ],
)
def test_whole_rows_travel_only_where_every_logit_counts(fields, count):
    assert wanted([draw(**fields)], 1) == (count,)


def test_a_row_of_several_draws_travels_as_the_most_demanding_asks():
    greedy, top = draw(temperature=0.0), draw(temperature=1.0, top_k=9)
    assert wanted([greedy, top, draw(row=1, temperature=0.0)], 2) == (9, 1)
    assert wanted([greedy, draw(temperature=1.0)], 1) == (0,)


def test_a_greedy_row_takes_eight_bytes_a_rank():
    logits = np.arange(VOCAB, dtype=np.float32)[None]
    _, sent = travelled(logits, (1,))
    assert sent == 4 + 8 + 8  # a rank of a single row sends just that


def test_rows_that_are_no_numbers_keep_their_length():
    logits = np.full((1, VOCAB), np.nan, np.float32)
    sparse, _ = travelled(logits, (3,))
    assert np.isnan(sparse[0, CUTS[1]])
