"""Batching: each arrow of the drawing, and what goes first when not all fits."""

from __future__ import annotations

import itertools

import pytest

from scheduler.batching import WHENEVER, Batcher, Sequence, Slice, Step
from scheduler.blocks import BlockPool
from scheduler.request import Job, Limits, Prompt, Sampling

UNLIKE = itertools.count(step=1000)


def sequence(prompt: int, *, emitted: int = 0, choice: int = 0, name: str = "a", **fields):
    job = Job(name, 1, "m", Prompt(text="x"), Sampling(seed=0), Limits(), 0.0)
    first = next(UNLIKE)  # no two sequences begin alike, so none finds its blocks in the cache
    tokens = list(range(first, first + prompt + emitted))
    return Sequence(job, choice, tokens, prompt, max_tokens=100, **fields)


def batcher(blocks: int = 8, **options: int) -> Batcher:
    return Batcher(BlockPool(blocks), **options)


def run(batch: Batcher) -> Step:
    """One step, with a token drawn wherever the step says so."""
    step = batch.next_step()
    batch.advance(step)
    for piece in step.slices:
        if piece.choices:
            piece.sequence.tokens.append(0)
    batch.check_integrity()
    return step


def ranges(step: Step) -> list[tuple[Sequence, int, int]]:
    return [(s.sequence, s.start, s.end) for s in step.slices]


# ── the drawing ─────────────────────────────────────────────────────────────────────────────────


def test_waiting_to_running_to_gone():
    batch, one = batcher(), sequence(20)
    batch.add(one)
    assert (list(batch.waiting), batch.running, batch.has_work) == ([one], [], True)
    step = run(batch)
    assert step == Step((Slice(one, 0, 20),), ())
    assert (list(batch.waiting), batch.running, batch.pool.free) == ([], [one], 6)
    batch.remove(one)
    assert (batch.running, batch.pool.free, batch.has_work) == ([], 8, False)
    assert (one.blocks, one.computed) == ([], 0)


def test_running_to_staged_to_gone_keeps_the_kv_and_computes_no_more():
    batch, one = batcher(), sequence(20, hold=True)
    batch.add(one)
    run(batch)
    batch.stage(one)
    assert (batch.running, batch.staged, batch.has_work) == ([], [one], False)
    assert (run(batch), batch.pool.free) == (Step((), ()), 6)
    batch.remove(one)
    assert (batch.staged, batch.pool.free) == ([], 8)


def test_waiting_to_staged_to_running_once_the_kv_is_here():
    batch, one = batcher(), sequence(20, awaits_kv=True)
    batch.add(one)
    assert run(batch) == Step((), (one,))
    assert (batch.staged, len(one.blocks), batch.has_work) == ([one], 2, False)
    one.computed = 20
    one.tokens.append(0)
    batch.resume(one)
    assert ranges(run(batch)) == [(one, 20, 21)]
    assert (batch.staged, batch.running) == ([], [one])


@pytest.mark.parametrize("place", ["waiting", "running", "staged", "gone"])
def test_remove_frees_everything_from_every_place(place):
    batch, one = batcher(), sequence(20)
    if place != "gone":
        batch.add(one)
    if place in ("running", "staged"):
        run(batch)
    if place == "staged":
        batch.stage(one)
    batch.remove(one)
    batch.remove(one)
    assert (batch.pool.free, batch.has_work, batch.staged) == (8, False, [])
    batch.check_integrity()


# ── the budget ──────────────────────────────────────────────────────────────────────────────────


def test_decodes_go_first_and_a_prompt_gets_what_is_left_in_chunks():
    batch = batcher(max_step_tokens=10)
    short, long = sequence(4), sequence(20)
    batch.add(short)
    run(batch)
    batch.add(long)
    assert ranges(run(batch)) == [(short, 4, 5), (long, 0, 9)]
    assert ranges(run(batch)) == [(short, 5, 6), (long, 9, 18)]
    assert ranges(run(batch)) == [(short, 6, 7), (long, 18, 20)]
    assert ranges(run(batch)) == [(short, 7, 8), (long, 20, 21)]


def test_only_the_last_chunk_draws_and_for_every_choice():
    batch, one = batcher(max_step_tokens=16), sequence(20, choice=2, forks=(3, 4))
    batch.add(one)
    first = batch.next_step()
    batch.advance(first)
    second = batch.next_step()
    assert [s.choices for s in (*first.slices, *second.slices)] == [(), (2, 3, 4)]


def test_a_last_chunk_of_one_token_counts_as_a_decode():
    batch, one = batcher(max_step_tokens=8), sequence(9)
    batch.add(one)
    assert ranges(run(batch)) == [(one, 0, 8)]
    assert ranges(run(batch)) == [(one, 8, 9)]


def test_prompts_share_a_step_oldest_first():
    batch = batcher(max_step_tokens=12)
    first, second, third = sequence(8), sequence(8), sequence(8)
    for one in (first, second, third):
        batch.add(one)
    assert ranges(run(batch)) == [(first, 0, 8), (second, 0, 4)]
    assert list(batch.waiting) == [third]
    assert ranges(run(batch)) == [(first, 8, 9), (second, 4, 8), (third, 0, 7)]


def test_more_decodes_than_the_budget_leave_the_youngest_out():
    batch = batcher(max_step_tokens=2)
    members = [sequence(1) for _ in range(3)]
    for one in members:
        batch.add(one)
    run(batch)
    assert [s.sequence for s in run(batch).slices] == members[:2]


def test_max_sequences_bounds_the_running_batch():
    batch = batcher(max_sequences=1)
    first, second = sequence(4), sequence(4)
    batch.add(first)
    batch.add(second)
    run(batch)
    assert (batch.running, list(batch.waiting)) == ([first], [second])
    batch.remove(first)
    assert ranges(run(batch)) == [(second, 0, 4)]


def test_a_prompt_without_blocks_waits_and_nobody_overtakes_it():
    batch = batcher(3)
    first, big, small = sequence(20), sequence(30), sequence(4)
    for one in (first, big, small):
        batch.add(one)
    run(batch)
    assert (batch.running, list(batch.waiting)) == ([first], [big, small])
    batch.remove(first)
    run(batch)
    assert batch.running == [big, small]


# ── reservations ────────────────────────────────────────────────────────────────────────────────


def test_reservations_are_granted_in_order_as_blocks_come_free():
    batch = batcher(4)
    first, second, third = (sequence(n, awaits_kv=True) for n in (30, 40, 10))
    for one in (first, second, third):
        batch.add(one)
    assert run(batch).granted == (first,)
    assert run(batch).granted == ()  # the third would fit, but the second is first
    batch.remove(first)
    assert run(batch).granted == (second, third)


def test_a_reservation_needs_no_budget():
    batch = batcher(max_step_tokens=4)
    prompt, reservation = sequence(9), sequence(9, awaits_kv=True)
    batch.add(prompt)
    batch.add(reservation)
    step = run(batch)
    assert (ranges(step), step.granted) == ([(prompt, 0, 4)], (reservation,))


# ── preemption ──────────────────────────────────────────────────────────────────────────────────


def test_the_youngest_gives_its_blocks_to_the_older_and_starts_anew():
    batch = batcher(2)
    old, young = sequence(16), sequence(15)
    batch.add(old)
    batch.add(young)
    run(batch)
    assert ranges(run(batch)) == [(old, 16, 17)]  # it needed a second block
    assert (batch.running, list(batch.waiting), batch.preempted) == ([old], [young], 1)
    assert (young.blocks, young.computed, len(young.tokens)) == ([], 0, 16)
    batch.remove(old)
    assert ranges(run(batch)) == [(young, 0, 16)]  # its own token is computed, not drawn again


def test_preempted_ones_go_back_in_their_old_order_before_who_came_later():
    batch = batcher(4)
    members = [sequence(16), sequence(14), sequence(14)]
    for one in members:
        batch.add(one)
    run(batch)
    late = sequence(40)
    batch.add(late)
    run(batch)  # the last free block
    members[0].tokens += [0] * 31  # three blocks more than it has
    members[0].computed = len(members[0].tokens) - 1
    batch.next_step()
    assert list(batch.waiting) == [*members[1:], late]


def test_one_that_is_itself_the_youngest_waits():
    batch = batcher(3)
    old, young = sequence(20), sequence(16)
    batch.add(old)
    batch.add(young)
    run(batch)
    assert ranges(run(batch)) == [(old, 20, 21)]
    assert list(batch.waiting) == [young]


def test_staged_kv_is_never_preempted():
    batch = batcher(3)
    kept, young = sequence(20, hold=True), sequence(16)
    batch.add(kept)
    batch.add(young)
    run(batch)
    batch.stage(kept)
    assert run(batch) == Step((), ())
    assert (batch.staged, list(batch.waiting), len(kept.blocks)) == ([kept], [young], 2)


# ── forks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "shared", "copies"),
    [(32, [0, 1], []), (20, [0], [(1, 2)]), (5, [], [(0, 1)])],
)
def test_a_fork_shares_whole_blocks_and_copies_the_partial_one(prompt, shared, copies):
    batch, parent = batcher(), sequence(prompt, forks=(1,))
    batch.add(parent)
    run(batch)
    child = sequence(prompt, emitted=1, choice=1)
    assert batch.fork(parent, child) == copies
    assert child.blocks == [*shared, *(to for _, to in copies)]
    assert (child.computed, batch.running) == (prompt, [parent, child])
    batch.check_integrity()
    batch.remove(parent)
    assert batch.pool.free == 8 - len(child.blocks)
    batch.remove(child)
    assert batch.pool.free == 8


def test_a_fork_without_a_free_block_waits_and_computes_for_itself():
    batch, parent = batcher(2), sequence(20, forks=(1,))
    batch.add(parent)
    run(batch)
    child = sequence(20, emitted=1, choice=1)
    assert batch.fork(parent, child) == []
    assert (list(batch.waiting), child.computed, child.blocks) == ([child], 0, [])
    batch.remove(parent)
    assert ranges(run(batch)) == [(child, 0, 21)]


def test_a_fork_of_a_parent_that_lost_its_kv_computes_for_itself():
    batch, parent, child = batcher(), sequence(20), sequence(20, emitted=1, choice=1)
    batch.add(parent)
    assert batch.fork(parent, child) == []
    assert list(batch.waiting) == [parent, child]


def test_integrity_names_a_lost_block():
    batch, one = batcher(), sequence(20)
    batch.add(one)
    run(batch)
    batch.running.remove(one)
    with pytest.raises(AssertionError, match="belongs to nobody"):
        batch.check_integrity()
    batch.waiting.append(one)
    with pytest.raises(AssertionError):
        batch.check_integrity()


# ── whose turn it is ────────────────────────────────────────────────────────────────────────────


TURNS = {
    "as they came": ([WHENEVER, WHENEVER, WHENEVER], [0, 1, 2]),
    "the earliest deadline": ([(0, 0, 9.0), (0, 0, 7.0), (0, 0, 8.0)], [1, 2, 0]),
    "a deadline before none": ([WHENEVER, (0, 0, 9.0)], [1, 0]),
    "a smaller share of the workers before a deadline": ([(0, 1, 7.0), (0, 0, 9.0)], [1, 0]),
    "priority before all": ([(0, 0, 7.0), (-1, 3, 9.0)], [1, 0]),
}


@pytest.mark.parametrize(("dues", "order"), TURNS.values(), ids=TURNS)
def test_prompts_begin_in_turn(dues, order):
    batch = batcher(blocks=40, max_step_tokens=16)
    sequences = [sequence(16) for _ in dues]
    for each, due in zip(sequences, dues, strict=True):
        each.due = due
        batch.add(each)
    began = []
    while batch.waiting:
        step = batch.next_step()
        began += [sequences.index(piece.sequence) for piece in step.slices]
        batch.advance(step)
        for piece in step.slices:
            batch.remove(piece.sequence)
    assert began == order


def test_an_urgent_prompt_passes_one_that_is_half_computed_but_no_decode():
    batch = batcher(blocks=40, max_step_tokens=17)
    decoding, long, urgent = sequence(1), sequence(64), sequence(16)
    batch.add(decoding)
    run(batch)
    batch.add(long)
    run(batch)
    assert 0 < long.computed < 64
    urgent.due = (0, 0, 1.0)
    batch.add(urgent)
    step = batch.next_step()
    assert [piece.sequence for piece in step.slices] == [decoding, urgent]


def test_a_reservation_does_not_wait_behind_prompts_for_a_budget_that_it_does_not_need():
    batch = batcher(blocks=40, max_step_tokens=16)
    first, second, reservation = sequence(16), sequence(16), sequence(16)
    reservation.awaits_kv = True
    for each in (first, second, reservation):
        batch.add(each)
    step = batch.next_step()
    assert [piece.sequence for piece in step.slices] == [first]
    assert (step.granted, batch.waiting) == ((reservation,), [second])
