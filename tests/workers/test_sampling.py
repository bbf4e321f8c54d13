from __future__ import annotations

import math

import numpy as np
import pytest

from scheduler.errors import BadRequest
from scheduler.request import Sampling
from workers.runner import Sampled
from workers.sampling import Draw, Sampler, check, kept

PROBABILITIES = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)
LOGITS = [math.log(p) for p in PROBABILITIES]

sample = Sampler().sample  # one for all: it keeps nothing


def draw(sampling, *, row=0, prompt=(0,), emitted=(), prompt_index=0, choice=0):
    return Draw(row, sampling, prompt_index, choice, [*prompt, *emitted], len(prompt))


def greedy(**options):
    return Sampling(seed=0, temperature=0.0, **options)


def fp32(rows):
    return np.array(rows, np.float32)


def one(logits, sampling, **where):
    """The token drawn from a single row."""
    return sample(fp32([logits]), [draw(sampling, **where)])[0].token


def drawn_at_each_position(logits, sampling, count):
    draws = [draw(sampling, emitted=[0] * position) for position in range(count)]
    return [s.token for s in sample(fp32([logits]), draws)]


# ── greedy and its adjustments ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("logits", "options", "prompt", "emitted", "token"),
    [
        ([1, 3, 2], {}, [0], [], 1),
        ([1, 3, 3], {}, [0], [], 1),  # the lowest of equals
        ([1, 3, 3], {"repetition_penalty": 1.0, "logit_bias": {0: 0.5}}, [0], [], 1),
        # repetition: divides above zero, multiplies below; prompt and emitted alike, once each
        ([1, 3, 2], {"repetition_penalty": 2.0}, [1], [], 2),
        ([1, 3, 2], {"repetition_penalty": 2.0}, [0], [1], 2),
        ([1, 3, 1.4], {"repetition_penalty": 2.0}, [1, 1], [1, 1], 1),
        ([-9, -1, -1.5], {"repetition_penalty": 2.0}, [1], [], 2),
        ([1, 2, 3], {"repetition_penalty": 0.5}, [1], [], 1),
        # presence and frequency: emitted tokens only
        ([1, 3, 2], {"presence_penalty": 1.5}, [1], [], 1),
        ([1, 3, 2], {"presence_penalty": 1.5}, [0], [1], 2),
        ([1, 3, 2], {"presence_penalty": 0.9}, [0], [1, 1, 1], 1),
        ([1, 3, 2], {"frequency_penalty": 0.4}, [1, 1, 1], [1, 1], 1),
        ([1, 3, 2], {"frequency_penalty": 0.4}, [0], [1, 1, 1], 2),
        ([1, 3, 2], {"frequency_penalty": -1.0}, [0], [2, 2], 2),
        ([1, 3, 2], {"frequency_penalty": 0.3, "presence_penalty": 0.6}, [0], [1], 1),
        ([1, 3, 2], {"frequency_penalty": 0.3, "presence_penalty": 0.6}, [0], [1, 1], 2),
        # repetition is taken before presence: 4/2 - 1.5 < 1, where (4 - 1.5)/2 > 1
        ([0, 4, 1], {"repetition_penalty": 2.0, "presence_penalty": 1.5}, [0], [1], 2),
        # bias
        ([1, 3, 2], {"logit_bias": {2: 1.5}}, [0], [], 2),
        ([1, 3, 2], {"logit_bias": {1: -100.0, 2: -100.0}}, [0], [], 0),
    ],
)
def test_the_largest_adjusted_logit_wins(logits, options, prompt, emitted, token):
    logits = [float(value) for value in logits]
    assert one(logits, greedy(**options), prompt=prompt, emitted=emitted) == token


def test_rows_of_a_batch_do_not_touch_each_other():
    logits = fp32([[1.0, 3.0, 2.0], [5.0, 1.0, 1.0]])
    before = logits.copy()
    draws = [
        draw(greedy(logit_bias={1: -9.0}), row=0),
        draw(greedy(), row=0),
        draw(greedy(), row=1),
        draw(greedy(repetition_penalty=9.0), row=1),
    ]
    assert [s.token for s in sample(logits, draws)] == [2, 1, 0, 1]
    assert np.array_equal(logits, before)


def test_nothing_to_draw_is_no_error():
    assert sample(np.empty((0, 5), np.float32), []) == []


# ── truncation ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}),
        ({"top_p": 0.79}, {0, 1, 2}),
        ({"top_p": 0.81}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 0.2}, {0, 1, 2, 3}),
        # top-p is of what top-k left: 0.4 of 0.8 is half
        ({"top_k": 3, "top_p": 0.49}, {0}),
        ({"top_k": 3, "top_p": 0.51}, {0, 1}),
        ({"top_k": 4, "min_p": 0.5}, {0, 1}),
        # temperature comes first: at 0.5 the first of them has 0.615 of the mass
        ({"temperature": 0.5, "top_p": 0.61}, {0}),
        ({"temperature": 0.5, "top_p": 0.62}, {0, 1}),
        ({"temperature": 0.5, "min_p": 0.3}, {0, 1}),
    ],
)
def test_only_what_truncation_leaves_is_drawn_and_all_of_it(options, possible):
    tokens = drawn_at_each_position(LOGITS, Sampling(seed=5, **options), 400)
    assert set(tokens) == possible


@pytest.mark.parametrize(
    ("options", "possible"),
    [({"top_k": 2}, {1, 2}), ({"top_p": 0.49}, {1, 2}), ({"top_k": 1}, {1})],
)
def test_of_equal_logits_the_lower_ids_are_kept(options, possible):
    logits = [0.0, 5.0, 5.0, 5.0, 5.0]
    assert set(drawn_at_each_position(logits, Sampling(seed=5, **options), 100)) == possible


@pytest.mark.parametrize("top_p", [1e-6, 0.05, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_top_p_keeps_the_smallest_set_that_suffices_of_a_whole_vocabulary(top_p):
    weights = np.exp(np.random.default_rng(3).normal(0, 2.5, 5000))
    ids = kept(weights, Sampling(seed=0, top_p=top_p))
    shares = weights / weights.sum()
    inside, outside = shares[ids], np.delete(shares, ids)
    assert inside.sum() >= top_p > inside.sum() - inside.min()
    assert outside.size == 0 or outside.max() <= inside.min()


# ── the distribution ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, [p**0.5 for p in PROBABILITIES]),
        ({"temperature": 0.5}, [p**2 for p in PROBABILITIES]),
        ({"top_k": 3}, PROBABILITIES[:3]),
        ({"top_p": 0.85}, PROBABILITIES[:4]),
        ({"logit_bias": {5: math.log(10.0)}}, [*PROBABILITIES[:5], 0.4]),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    count = 5000
    tokens = drawn_at_each_position(LOGITS, Sampling(seed=11, **options), count)
    shares = np.array(expected) / sum(expected)
    observed = np.bincount(tokens, minlength=len(shares))
    chi_square = ((observed - count * shares) ** 2 / (count * shares)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: 1 in 1,000


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even():
    cold = drawn_at_each_position(LOGITS, Sampling(seed=2, temperature=1e-300), 50)
    assert set(cold) == {0}
    hot = drawn_at_each_position(LOGITS, Sampling(seed=2, temperature=1e9), 3000)
    assert min(np.bincount(hot, minlength=6)) > 400


def test_a_draw_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    rows = fp32(rng.normal(0, 3, (8, 500)))
    draws = [
        draw(Sampling(seed=i % 3, top_p=0.9), row=i, emitted=[4] * i, choice=i % 2)
        for i in range(8)
    ]
    together = sample(rows, draws)
    backwards = sample(rows, draws[::-1])[::-1]
    alone = [
        sample(rows[i : i + 1], [draw(d.sampling, emitted=[4] * i, choice=d.choice)])[0]
        for i, d in enumerate(draws)
    ]
    assert together == backwards == alone
    assert len({s.token for s in together}) > 4


def test_choices_of_one_row_are_drawn_apart_and_a_replay_draws_again_the_same():
    sampling = Sampling(seed=3)
    flat = np.zeros((1, 1000), np.float32)
    first = sample(flat, [draw(sampling, choice=c) for c in range(5)])
    assert len({s.token for s in first}) == 5
    again = [sample(flat, [draw(sampling, choice=c)])[0] for c in (4, 2)]
    assert again == [first[4], first[2]]


# ── logprobs ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("count", "top"), [(0, []), (1, [0]), (3, [0, 1, 2]), (99, [0, 1, 2, 3, 4, 5])]
)
def test_logprobs_are_of_the_models_own_distribution(count, top):
    logits = [value + 3.0 for value in LOGITS]  # a shift changes no probability
    sampling = greedy(logprobs=count, logit_bias={3: 50.0}, repetition_penalty=1.5)
    (sampled,) = sample(fp32([logits]), [draw(sampling)])
    assert sampled.token == 3
    assert sampled.logprob == pytest.approx(LOGITS[3], abs=1e-6)
    assert [token for token, _ in sampled.top] == top
    assert [value for _, value in sampled.top] == pytest.approx([LOGITS[t] for t in top], abs=1e-6)


def test_logprobs_are_reported_only_where_they_were_asked_for():
    drawn = sample(fp32([LOGITS]), [draw(Sampling(seed=0)), draw(greedy())])
    assert all(s == Sampled(s.token) for s in drawn)


def test_equal_logprobs_are_listed_by_id():
    (sampled,) = sample(fp32([[1.0, 2.0, 1.0, 2.0]]), [draw(greedy(logprobs=3))])
    assert [token for token, _ in sampled.top] == [1, 3, 0]


# ── check ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("token", [-1, 6])
def test_a_bias_on_a_token_that_does_not_exist_is_refused(token):
    with pytest.raises(BadRequest, match="0 to 5") as refused:
        check(greedy(logit_bias={0: 1.0, token: 1.0}), 6)
    assert refused.value.param == "logit_bias"


def test_a_bias_on_any_token_that_exists_is_accepted():
    check(greedy(logit_bias={0: 1.0, 5: 1.0}), 6)
