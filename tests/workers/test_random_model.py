"""Models that are made up: the right number of weights, which look like weights, and no more."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from gguf.quants import dequantize
from msgspec.structs import replace

from kernels.program import Pool, Span
from scheduler.errors import SetupError
from workers.fast_model import FastModel
from workers.group.partition import partition
from workers.group.shard import Shard, ShardModel
from workers.group.shard_file import write_shard
from workers.group.sharded import cut
from workers.kv_cache import KvCache
from workers.weights.checkpoint import open_checkpoint
from workers.weights.families import EMBEDDING, model_tensors
from workers.weights.random_model import SHAPES, RandomModel

TINY = replace(
    SHAPES["llama3-8b"], layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=192, vocab=320
)
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model():
    return RandomModel(TINY)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.74),  # as the papers say: Touvron et al. 2023; Llama Team 2024
        ("llama2-13b", 13.02),
        ("llama2-70b", 68.98),
        ("llama3-8b", 8.03),
        ("llama3-70b", 70.55),
    ],
)
def test_a_shape_has_as_many_weights_as_the_model_of_its_name(name, billions):
    shape = open_checkpoint(f"random:{name}").shape
    count = sum(math.prod(dims) for dims in model_tensors(shape).values())
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


def test_an_unknown_shape_is_refused_with_those_that_are_known():
    with pytest.raises(SetupError, match=r"no shape 'gpt-5': known are llama2-7b, .*llama3-70b"):
        open_checkpoint("random:gpt-5")


def test_every_weight_of_the_shape_is_there_in_its_size(model):
    assert model.names == tuple(model_tensors(TINY))
    for name, dims in model_tensors(TINY).items():
        stored = model.stored(name)
        if len(dims) == 1:
            assert stored is None
            assert np.array_equal(model.array(name), np.ones(dims))
        else:
            assert stored.dims == dims
            assert dequantize(stored.data, stored.kind).shape == dims


def both(model, name):
    """Its weights as they would be stored in a file, and as they are packed at once."""
    stored, matrix = model.stored(name), model.matrix(name)
    return dequantize(stored.data, stored.kind), matrix.rows(0, matrix.outputs)


def test_weights_look_like_weights_so_that_nothing_overflows(model):
    for weights in both(model, UP):
        assert weights.shape == (192, 64)
        assert np.isfinite(weights).all()
        assert 0.01 < np.abs(weights).max() <= 8 * 0.002
        assert abs(weights.mean()) < 0.2 * weights.std()  # of 16 values 8 are below 0 and 7 above
        assert len(np.unique(weights)) > 1000


def test_the_same_model_twice_is_the_same_and_every_other_one_is_not(model):
    def bits(model, name=UP):
        return [weights.tobytes() for weights in both(model, name)]

    assert bits(model) == bits(RandomModel(TINY))
    others = [bits(RandomModel(TINY, seed=1)), bits(model, UP.replace("layers.0", "layers.1"))]
    for other in others:
        assert all(one != another for one, another in zip(bits(model), other, strict=True))


def test_scales_stand_where_the_kernels_look_for_them(model):
    """First in each block of a row; where it is packed, those of a panel's 16 rows together."""
    blocks = model.stored(UP).data.reshape(-1, 18)[:, :2]
    panels = model.matrix(UP).data.reshape(-1, 16 * 18)[:, : 2 * 16]
    for scales in (blocks, panels):
        values = np.ascontiguousarray(scales).view(np.float16)
        assert values.min() >= np.float16(0.001)
        assert values.max() <= np.float16(0.002)


def test_a_disk_cannot_compress_it(model):
    for data in (model.matrix(UP).data, model.stored(UP).data):
        assert len(zlib.compress(data.tobytes(), 9)) > 0.9 * data.nbytes


def test_the_table_of_tokens_takes_the_memory_of_one_row(model):
    table = model.stored(EMBEDDING)
    assert table.dims == (320, 64)
    assert table.data.strides[0] == 0


def test_a_rank_s_part_is_made_up_by_itself_and_ranks_hold_other_weights(model):
    first, second = (cut(model, share) for share in partition(TINY, [1, 1]))
    assert first.shape.ffn == second.shape.ffn == 96
    assert first.stored(UP).dims == (96, 64)
    assert not np.array_equal(first.stored(UP).data, second.stored(UP).data)


def test_it_computes_but_cannot_read(model, tmp_path):
    manifest = write_shard(model, tmp_path, "random")
    shard = Shard(tmp_path, manifest, manifest.size, direct=False)
    caches = [KvCache(TINY, 4, "float16") for _ in range(2)]
    whole = FastModel(model, caches[0], Pool(1), 8)
    packed = ShardModel(shard, caches[1], Pool(1), 8, combine=lambda part: None)
    for computing in (whole, packed):
        computing.x.data[:8] = 1
        computing.program.run([5] * 8, [Span(0, 8, 0, [0])], [7])
        logits = computing.drawn_logits.data[0]
        assert np.isfinite(logits).all()
        assert len(np.unique(logits)) > 100
    shard.close()
    model.close()
    with pytest.raises(SetupError, match="cannot read text"):
        model.tokenizer()
