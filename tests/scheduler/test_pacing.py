"""Pacing: prompts beside decodes get what the bound leaves, on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import Batcher, Sequence
from scheduler.blocks import BlockPool
from scheduler.pacing import FIRST_CHUNK, LEAST_CHUNK, Pace
from scheduler.request import Job, Limits, Prompt, Sampling


def taught(bound_s: float | None, decode_s: float, token_s: float) -> Pace:
    pace = Pace(bound_s)
    pace.learn(8, 0, decode_s)
    pace.learn(8, 100, decode_s + 100 * token_s)
    return pace


@pytest.mark.parametrize(
    ("pace", "decodes", "tokens"),
    [
        (Pace(None), 8, 500),  # no bound
        (taught(None, 0.01, 0.001), 8, 500),
        (taught(0.1, 0.01, 0.001), 0, 500),  # nobody waits for a next token
        (Pace(0.1), 8, FIRST_CHUNK),  # nothing is known
        (taught(0.1, 0.01, 0.001), 8, 60),  # 0.7 · 100 ms = 10 ms + 60 · 1 ms
        (taught(0.1, 0.05, 0.001), 8, 20),
        (taught(0.1, 0.01, 0.00001), 8, 500),  # never more than the step holds
        (taught(0.1, 0.2, 0.001), 8, LEAST_CHUNK),  # never so few that a prompt starves
    ],
)
def test_what_is_left_of_the_bound_is_for_prompts(pace, decodes, tokens):
    assert pace.prompt_tokens(decodes, most=500) == pytest.approx(tokens, abs=1)


@given(
    bound_s=st.floats(0.05, 0.5),
    decode_s=st.floats(0.001, 0.02),
    token_s=st.floats(1e-5, 1e-3),
    slowdown=st.floats(0.3, 3),
)
def test_steps_stay_within_the_bound_once_the_machine_is_known(
    bound_s, decode_s, token_s, slowdown
):
    """A machine that changes its speed is followed within twenty steps."""
    pace = taught(bound_s, decode_s, token_s)
    for _ in range(20):
        tokens = pace.prompt_tokens(8, most=512)
        pace.learn(8, 0, slowdown * decode_s)
        pace.learn(8, tokens, slowdown * (decode_s + tokens * token_s))
    tokens = pace.prompt_tokens(8, most=512)
    seconds = slowdown * (decode_s + tokens * token_s)
    assert seconds <= bound_s or tokens == LEAST_CHUNK


def test_a_long_prompt_comes_in_chunks_only_while_others_decode():
    batch = Batcher(BlockPool(64), pace=taught(0.1, 0.01, 0.001))

    def sequence(first: int, count: int) -> Sequence:
        job = Job("a", 1, "m", Prompt(text="x"), Sampling(seed=0), Limits(), 0.0)
        return Sequence(job, 0, [*range(first, first + count)], count, max_tokens=9)

    decoding, prompt = sequence(0, 10), sequence(1000, 300)
    batch.add(decoding)
    batch.advance(batch.next_step())
    decoding.tokens.append(0)
    batch.add(prompt)
    step = batch.next_step()
    assert (step.decodes, step.prompt_tokens) == (1, pytest.approx(60, abs=1))
    batch.advance(step)
    batch.remove(decoding)
    assert batch.next_step().prompt_tokens == 300 - step.prompt_tokens


def test_tokens_that_get_dearer_with_the_context_stay_within_the_bound():
    """By a tenth a step: what attention does to a long prompt that is cut into large pieces."""
    pace = taught(0.12, 0.012, 0.0005)
    token_s = 0.0005
    for _ in range(12):
        token_s *= 1.1
        tokens = pace.prompt_tokens(8, most=512)
        seconds = 0.012 + tokens * token_s
        assert 0.06 < seconds <= 0.12
        pace.learn(8, tokens, seconds)
