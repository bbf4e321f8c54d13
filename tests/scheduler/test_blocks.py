"""Blocks: who holds how many, and that a shared one is free with its last holder."""

from __future__ import annotations

import pytest

from scheduler.blocks import BlockPool, blocks_for


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_a_block_is_sixteen_tokens(tokens, blocks):
    assert blocks_for(tokens) == blocks


def test_low_numbers_go_first_so_that_runs_are_long():
    assert BlockPool(8).allocate(3) == [0, 1, 2]


def test_a_shared_block_is_free_when_its_last_holder_releases_it():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.release(blocks)
    assert pool.free == 3
    pool.release(blocks[:1])
    assert pool.free == 4
    pool.check_integrity()


def test_misuse_is_caught_where_it_happens():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])
    with pytest.raises(AssertionError, match="shared but free"):
        pool.share([block])
    pool.check_integrity()
