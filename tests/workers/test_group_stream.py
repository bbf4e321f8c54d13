"""Weights that pass through memory: the same bytes, within the budget, evenly spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.program import Pool, Span
from scheduler.errors import SetupError
from workers.fast_model import FastModel
from workers.group import memory
from workers.group.memory import is_expert, ring_bytes, slots_bytes, streamable
from workers.group.partition import partition
from workers.group.shard import Shard, ShardModel
from workers.group.shard_file import DATA, Entry, check, read_manifest, write_shard
from workers.group.sharded import Sharded
from workers.group.stream import Stream, choose_streamed
from workers.kv_cache import KvCache
from workers.weights.checkpoint import open_checkpoint

PAGE = 4096


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.floats(0, 1.2))
def test_what_stays_and_the_window_fit_the_budget_and_the_disk_never_idles_long(pages, part):
    sizes = [PAGE * count for count in pages]
    budget = int(sum(sizes) * part)
    try:
        streamed = choose_streamed(sizes, budget)
    except ValueError:
        assert ring_bytes(sizes) > budget
        return
    resident = sum(sizes) - sum(sizes[index] for index in streamed)
    assert resident + (ring_bytes(sizes) if streamed else 0) <= budget
    if streamed:  # no more than needed: one weight less would not fit, up to rounding
        assert resident + ring_bytes(sizes) > budget - 2 * max(sizes)


def test_streamed_weights_are_evenly_spaced():
    assert choose_streamed([PAGE] * 12, 9 * PAGE) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("slots", [2, 3, 7])
def test_every_weight_is_there_when_it_is_needed_step_after_step(tmp_path, direct, slots):
    rng = np.random.default_rng(slots)
    sizes = [int(size) for size in rng.integers(1, 2 * PAGE, 9)]
    contents, entries, offset = [], [], 0
    for number, size in enumerate(sizes):
        entries.append(Entry(str(number), "Q8_0", (1, 1), offset, size, ""))
        contents.append(rng.bytes(size))
        offset += entries[-1].padded
    with (tmp_path / DATA).open("wb") as file:
        for entry, content in zip(entries, contents, strict=True):
            file.write(content + bytes(entry.padded - entry.size))
    stream = Stream(tmp_path / DATA, entries, slots * 2 * PAGE, direct=direct)
    for _ in range(5):
        for number, content in enumerate(contents):
            stream.need(number)
            assert stream.view(number).tobytes() == content
        stream.end()
    stream.close()
    assert stream.bytes_read >= 5 * sum(entry.padded for entry in entries)


def test_a_file_that_is_cut_off_says_so(tmp_path):
    (tmp_path / DATA).write_bytes(b"x" * PAGE)
    entries = [Entry(str(n), "Q8_0", (1, 1), n * PAGE, PAGE, "") for n in range(2)]
    stream = Stream(tmp_path / DATA, entries, 2 * PAGE, direct=False)
    with pytest.raises(OSError, match="1 is cut off"):
        stream.need(1)
    stream.close()


# ── shards of a model ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def weights(tiny_model):
    """The second rank's part of a small quantised model."""
    _, folder = tiny_model("Llama", hidden_size=64, intermediate_size=192, vocab_size=320)
    checkpoint = open_checkpoint(folder, "int4")
    return Sharded(checkpoint, partition(checkpoint.shape, [1, 2])[1])


def numbers(model):
    """What a model makes of two prompts, one after the other."""
    x = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    results = []
    for span in (Span(0, 20, 0, [0, 1]), Span(0, 7, 20, [0, 1])):
        rows = span.count
        model.x.data[:rows] = x[:rows]
        model.program.run([0] * rows, [span], [rows - 1])
        results.append(model.drawn_logits.data[:1].copy())
        results.append(model.logits(model.x.data[: min(rows, 16)]).copy())
    return results


def test_a_model_whose_weights_pass_through_gives_the_same_bits(weights, tmp_path):
    manifest = write_shard(weights, tmp_path, "a model")
    matrices = [entry.padded for entry in manifest.entries if len(entry.dims) > 1]
    fixed = manifest.size - sum(matrices) + matrices[-1]  # the head stays
    budget = fixed + ring_bytes(matrices[:-1]) + sum(matrices[:-1]) // 3
    pool = Pool(1)
    whole = FastModel(
        weights, KvCache(weights.shape, 4, "float16"), pool, 32, combine=lambda part: None
    )
    shard = Shard(tmp_path, manifest, budget, direct=True)
    model = ShardModel(
        shard, KvCache(weights.shape, 4, "float16"), pool, 32, combine=lambda part: None
    )
    assert 0.3 < shard.streamed_bytes / shard.total_bytes < 0.9
    for streamed, resident in zip(numbers(model), numbers(whole), strict=True):
        assert np.array_equal(streamed, resident)
    shard.close()


EXPERTS = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 64, "head_dim": 16},
}


@pytest.fixture(scope="module", params=EXPERTS)
def experts(request, tiny_model):
    """A rank's part of a small model whose layers have experts, two of them for each row."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 320}
    chosen = {"num_experts_per_tok": 2} | EXPERTS[request.param]
    _, folder = tiny_model(request.param, **sizes, **chosen)
    checkpoint = open_checkpoint(folder, "int4")
    return Sharded(checkpoint, partition(checkpoint.shape, [1, 1])[1])


@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_experts_that_are_read_when_they_are_chosen_give_the_same_bits(
    experts, tmp_path, monkeypatch, slots, part
):
    """With `part` of them in memory; the one slot that is the least turns round most often."""
    manifest = write_shard(experts, tmp_path, "a model")
    sizes = [entry.padded for entry in manifest.entries if is_expert(entry.name)]
    monkeypatch.setattr(memory, "SLOTS_BYTES", slots * max(sizes))
    budget = manifest.size - sum(sizes) + slots_bytes(sizes) + int(part * sum(sizes))
    shard = Shard(tmp_path, manifest, budget, direct=False)
    assert (part == 1) == (shard.slots is None)
    assert shard.streamed_bytes == 0
    assert shard.chosen_bytes == pytest.approx((1 - part) * sum(sizes), abs=2 * max(sizes))
    pool, shape = Pool(1), experts.shape
    whole, model = (
        maker(weights, KvCache(shape, 4, "float16"), pool, 32, combine=lambda part: None)
        for maker, weights in ((FastModel, experts), (ShardModel, shard))
    )
    for absent, resident in zip(numbers(model), numbers(whole), strict=True):
        assert np.array_equal(absent, resident)
    if part == 0:  # a row takes two experts in each layer, a matrix of each kind
        before = shard.bytes_read
        model.program.run([0], [Span(0, 1, 27, [0, 1])], [0])
        assert shard.bytes_read - before == shape.layers * 2 * 3 * max(sizes)
    shard.close()


def test_under_a_tight_cap_experts_and_all_else_pass_through(experts, tmp_path):
    manifest = write_shard(experts, tmp_path, "a model")
    split = {True: [], False: []}
    for entry in manifest.entries:
        if is_expert(entry.name) or streamable(entry.name, entry.dims):
            split[is_expert(entry.name)].append(entry.padded)
    ring, slots = ring_bytes(split[False]), slots_bytes(split[True])
    budget = manifest.size - sum(map(sum, split.values())) + ring + slots
    shard = Shard(tmp_path, manifest, budget, direct=False)
    assert (shard.streamed_bytes, shard.chosen_bytes) == (sum(split[False]), sum(split[True]))
    caches = [KvCache(experts.shape, 4, "float16") for _ in range(2)]
    model = ShardModel(shard, caches[0], Pool(1), 32, combine=lambda part: None)
    whole = FastModel(experts, caches[1], Pool(1), 32, combine=lambda part: None)
    for passing, resident in zip(numbers(model), numbers(whole), strict=True):
        assert np.array_equal(passing, resident)
    shard.close()
    with pytest.raises(SetupError, match="MiB too little"):
        Shard(tmp_path, manifest, budget - 4096, direct=False)


def test_a_shard_is_whole_of_this_model_and_undamaged_or_made_anew(weights, tmp_path):
    manifest = write_shard(weights, tmp_path, "a model")
    assert read_manifest(tmp_path, "a model") == manifest
    assert read_manifest(tmp_path, "another") is None
    assert check(tmp_path, manifest) == []
    damaged = manifest.entries[3]
    with (tmp_path / DATA).open("r+b") as file:
        file.seek(damaged.offset)
        byte = file.read(1)[0]
        file.seek(damaged.offset)
        file.write(bytes([byte ^ 1]))
    assert check(tmp_path, manifest) == [damaged]
    with (tmp_path / DATA).open("r+b") as file:
        file.truncate(manifest.size - PAGE)
    assert read_manifest(tmp_path, "a model") is None


def test_a_cap_that_leaves_no_window_says_what_is_missing(weights, tmp_path):
    manifest = write_shard(weights, tmp_path, "a model")
    with pytest.raises(SetupError, match="1 MiB too little: raise the cap"):
        Shard(tmp_path, manifest, 3 * PAGE, direct=False)
