"""Prefix caching: what begins alike is computed once, and nobody reads what is not theirs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import Batcher, Sequence
from scheduler.blocks import BlockPool, block_hash
from scheduler.models import BLOCK_TOKENS
from scheduler.request import Job, Limits, Prompt, Sampling


def sequence(tokens: list[int], **fields) -> Sequence:
    job = Job("a", 1, "m", Prompt(text="x"), Sampling(seed=0), Limits(), 0.0)
    return Sequence(job, 0, list(tokens), len(tokens), max_tokens=100, **fields)


def compute(batch: Batcher, one: Sequence) -> list[tuple[int, int]]:
    """Prefill a sequence and draw its first token; gives the ranges that were computed."""
    batch.add(one)
    ranges = []
    while one.remaining:
        step = batch.next_step()
        batch.advance(step)
        ranges += [(s.start, s.end) for s in step.slices if s.sequence is one]
        batch.check_integrity()
    one.tokens.append(-1)
    return ranges


@pytest.mark.parametrize(
    ("first", "second", "computed"),
    [
        (range(40), range(40), [(32, 40)]),  # two whole blocks are known
        (range(32), range(32), [(16, 32)]),  # the last token's logits are always computed
        (range(40), range(100), [(32, 100)]),
        (range(40), [*range(20), *range(90, 120)], [(16, 50)]),  # alike in one block only
        (range(40), range(1, 41), [(0, 40)]),  # alike but for their beginning: not the same
        (range(15), range(15), [(0, 15)]),  # no whole block
    ],
)
@pytest.mark.parametrize("gone", [False, True], ids=["beside it", "after it"])
def test_whole_blocks_that_begin_alike_are_computed_once(first, second, computed, gone):
    batch = Batcher(BlockPool(32))
    earlier, later = sequence([*first]), sequence([*second])
    compute(batch, earlier)
    if gone:
        batch.remove(earlier)
    assert compute(batch, later) == computed
    assert later.cached == computed[0][0]
    batch.remove(earlier)
    batch.remove(later)
    assert batch.pool.free == 32


def test_emitted_tokens_are_found_again_by_the_next_turn():
    batch = Batcher(BlockPool(32))
    turn = sequence([*range(10)])
    compute(batch, turn)
    while len(turn.tokens) < 40:
        batch.advance(batch.next_step())
        turn.tokens.append(len(turn.tokens))
    batch.remove(turn)
    assert compute(batch, sequence([*turn.tokens[:39], 7, 8, 9])) == [(32, 42)]


def test_idle_blocks_are_reused_oldest_first_and_ends_before_beginnings():
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block in (*old, *new):
        pool.name(block, bytes([block]))
    pool.release(old)
    pool.release(new)
    assert [pool.allocate(1) for _ in range(4)] == [[old[1]], [old[0]], [new[1]], [new[0]]]
    assert pool.find([bytes([old[0]])]) == []


def test_kv_that_arrives_never_goes_into_blocks_that_others_read():
    batch = Batcher(BlockPool(8))
    here = sequence([*range(40)])
    compute(batch, here)
    coming = sequence([*range(40)], awaits_kv=True)
    batch.add(coming)
    assert batch.next_step().granted == (coming,)
    assert not set(coming.blocks) & set(here.blocks)


def test_a_preempted_sequence_finds_what_it_had():
    batch = Batcher(BlockPool(6))
    one = sequence([*range(40)])
    compute(batch, one)
    batch._preempt(one)
    assert one.cached == 0  # what a request reports is what others had computed for it
    step = batch.next_step()
    assert [(s.start, s.end) for s in step.slices] == [(32, 41)]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60))
def test_found_blocks_hold_exactly_the_same_beginning(one, other):
    batch = Batcher(BlockPool(64))
    contents: dict[int, tuple[int, ...]] = {}
    for tokens in (one, other):
        if not tokens:
            continue
        running = sequence(tokens)
        compute(batch, running)
        for index in range(len(tokens) // BLOCK_TOKENS):
            beginning = tuple(tokens[: (index + 1) * BLOCK_TOKENS])
            assert contents.setdefault(running.blocks[index], beginning) == beginning


def test_a_name_depends_on_everything_before():
    tokens = range(16)
    assert block_hash(b"", tokens) != block_hash(block_hash(b"", tokens), tokens)
