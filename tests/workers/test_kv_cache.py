"""The KV cache's bytes: views in the order of the wire, whatever the blocks are called."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from workers.fake import SHAPE
from workers.kv_cache import KvCache

SHAPE_3 = msgspec.structs.replace(SHAPE, layers=3, kv_heads=2, head_dim=4)


def filled(blocks: int, seed: int = 0, dtype: str = "float32") -> KvCache:
    cache = KvCache(SHAPE_3, blocks, dtype)
    cache.data[:] = 9 * np.random.default_rng(seed).normal(size=cache.data.shape)
    return cache


def canonical(cache: KvCache, blocks: list[int], tokens: int, layers: range) -> bytes:
    """[layers, 2, tokens, K, E], token by token."""
    rows = [
        cache.data[layer, part, blocks[t // 16], t % 16]
        for layer in layers
        for part in (0, 1)
        for t in range(tokens)
    ]
    return np.stack(rows).tobytes()


TABLE = [
    ([0], 1, range(3), 6),
    ([0, 1, 2], 48, range(3), 6),
    ([0, 1, 2], 33, range(3), 6),
    ([3, 1, 2, 7], 60, range(3), 18),
    ([5, 6, 7], 20, range(1, 2), 2),
    ([2, 0], 16, range(3), 6),
    ([2, 0], 0, range(3), 0),
    ([2, 3], 20, range(0), 0),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("blocks", "tokens", "layers", "views"), TABLE)
def test_views_are_the_wire_format_in_as_few_pieces_as_the_blocks_have_runs(
    blocks, tokens, layers, views, dtype
):
    cache = filled(8, dtype=dtype)
    found = cache.views(blocks, range(tokens), layers)
    assert len(found) == views
    expected = canonical(cache, blocks, tokens, layers) if views else b""
    assert b"".join(found) == expected


def test_views_are_the_cache_itself_and_another_cache_takes_them():
    source, target = filled(8, seed=1), KvCache(SHAPE_3, 8)
    theirs, ours, tokens = [6, 2, 3], [0, 1, 5], 45
    data = b"".join(source.views(theirs, range(tokens), range(3)))
    start = 0
    for view in target.views(ours, range(tokens), range(3)):
        view[:] = data[start : start + view.nbytes]
        start += view.nbytes
    assert canonical(target, ours, tokens, range(3)) == data
    assert not target.data[:, :, [2, 3, 4, 6, 7]].any()


def test_copy_is_of_whole_blocks_in_every_layer():
    cache = filled(4)
    before = cache.data.copy()
    cache.copy([(1, 3)])
    assert np.array_equal(cache.data[:, :, 3], before[:, :, 1])
    assert np.array_equal(cache.data[:, :, :3], before[:, :, :3])


@pytest.mark.parametrize(("dtype", "width"), [("float32", 16), ("float16", 8), ("int8", 4 + 2)])
def test_a_cache_takes_this_many_bytes(dtype, width):
    cache = KvCache(SHAPE_3, 5, dtype)
    assert cache.dtype == dtype
    assert cache.token_bytes == 2 * 2 * width
    assert cache.data.nbytes == 3 * 5 * 16 * cache.token_bytes
