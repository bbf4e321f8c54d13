"""Weights that pass through memory: the same bytes, within the budget, evenly spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.program import Pool, Span
from scheduler.errors import SetupError
from workers.fast_model import FastModel
from workers.group.partition import partition
from workers.group.shard import Shard, ShardModel
from workers.group.shard_file import DATA, Entry, check, read_manifest, write_shard
from workers.group.sharded import Sharded
from workers.group.stream import Stream, choose_streamed, ring_bytes
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
