from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.fast_model import objection
from workers.group.partition import apportion, most_ranks, partition


def shape(heads=9, kv_heads=3, ffn=1536, vocab=49152, head_dim=64, **more):
    return ModelShape(
        layers=2,
        hidden=576,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        context_length=2048,
        rope_theta=1e4,
        norm_eps=1e-5,
        tied_embeddings=True,
        **more,
    )


def spans(ranges):
    return [(r.first, r.last) for r in ranges]


@pytest.mark.parametrize(
    ("weights", "heads", "kv_heads"),
    [
        ([1], [(0, 9)], [(0, 3)]),
        ([2, 1], [(0, 6), (6, 9)], [(0, 2), (2, 3)]),
        ([1, 1, 1, 1], [(0, 3), (3, 6), (6, 8), (8, 9)], [(0, 1), (1, 2), (2, 3), (2, 3)]),
    ],
)
def test_whole_kv_groups_while_there_are_enough_and_parts_of_one_beyond(weights, heads, kv_heads):
    shares = partition(shape(), weights)
    assert spans(s.heads for s in shares) == heads
    assert spans(s.kv_heads for s in shares) == kv_heads


def test_columns_make_up_for_what_heads_leave_uneven():
    first, second = partition(shape(), [1, 1])
    assert (first.heads.count, second.heads.count) == (6, 3)
    assert first.ffn.count < second.ffn.count


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (10, "10 ranks for 9 query heads: leave out 1"),
        (3, "cannot be shared by 3 ranks"),
    ],
)
def test_too_many_ranks_are_refused_with_what_to_do(ranks, message):
    with pytest.raises(SetupError, match=message):
        partition(shape(ffn=64), [1.0] * ranks)


NARROW = [  # heads, kv heads, numbers of each, ranks: query heads of each rank in fast mode
    (12, 4, 16, 2, [6, 6]),  # pairs of kv groups, each of 3 heads
    (12, 6, 16, 4, [4, 4, 2, 2]),  # any kv group
    (12, 6, 16, 6, [2] * 6),
    (8, 2, 16, 4, [2] * 4),  # a kv group is shared by two
    (16, 2, 80, 5, [4, 2, 2, 4, 4]),  # two heads are five blocks
    (9, 3, 64, 4, [3, 3, 2, 1]),
]


@pytest.mark.parametrize(("heads", "kv_heads", "width", "ranks", "expected"), NARROW)
def test_narrow_heads_stay_together_in_as_many_as_fill_whole_blocks(
    heads, kv_heads, width, ranks, expected
):
    whole = shape(heads, kv_heads, head_dim=width)
    assert sorted(s.heads.count for s in partition(whole, [1] * ranks)) == sorted(expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "most"),
    [(12, 4, 16, 2), (12, 6, 16, 6), (8, 2, 16, 4), (16, 2, 80, 8), (4, 4, 8, 1), (9, 3, 64, 9)],
)
def test_fewer_ranks_can_share_narrow_heads_than_there_are_heads(heads, kv_heads, width, most):
    whole = shape(heads, kv_heads, head_dim=width)
    assert most_ranks(whole, "fast") == most
    assert most_ranks(whole, "exact") == heads
    for ranks in range(1, heads + 1):
        assert len(partition(whole, [1] * ranks, "exact")) == ranks
    for ranks in range(1, most + 1):
        assert all(s.heads.count * width % 32 == 0 for s in partition(whole, [1] * ranks))
    if most < heads:
        with pytest.raises(SetupError, match=f"leave out {heads - most}"):
            partition(whole, [1] * heads)


WEIGHTS = st.lists(st.floats(0.05, 20), min_size=1, max_size=8)


@given(WEIGHTS, st.integers(1, 6), st.integers(1, 8), st.sampled_from([64, 16, 48, 40]))
def test_everything_is_held_once_and_every_head_with_its_kv_head(weights, kv_heads, group, width):
    whole = shape(heads=kv_heads * group, kv_heads=kv_heads, head_dim=width)
    if len(weights) > most_ranks(whole, "fast"):
        return
    shares = partition(whole, weights)
    for part, total in (("heads", whole.heads), ("ffn", whole.ffn), ("vocab", whole.vocab)):
        ranges = [getattr(share, part) for share in shares]
        assert ranges[0].first == 0
        assert ranges[-1].last == total
        assert all(a.last == b.first for a, b in itertools.pairwise(ranges))
        assert all(r.count > 0 for r in ranges)
    for share in shares:
        assert share.ffn.first % 32 == share.vocab.first % 16 == 0
        needed = {head // group for head in range(share.heads.first, share.heads.last)}
        assert needed == set(range(share.kv_heads.first, share.kv_heads.last))
        local = share.shape(whole)
        assert local.heads % local.kv_heads == 0  # what a rank computes is a model of its own
        assert objection(local) is None or objection(whole)


@given(st.integers(1, 300), WEIGHTS)
def test_shares_are_as_fair_as_whole_units_allow(units, weights):
    if units < len(weights):
        return
    counts = apportion(units, weights)
    assert sum(counts) == units
    slowest = max(count / weight for count, weight in zip(counts, weights, strict=True))
    for giver in range(len(weights)):
        for taker in range(len(weights)):
            moved = list(counts)
            moved[giver] -= 1
            moved[taker] += 1
            if moved[giver] >= 1 and giver != taker:
                other = max(c / w for c, w in zip(moved, weights, strict=True))
                assert other >= slowest * (1 - 1e-9)
