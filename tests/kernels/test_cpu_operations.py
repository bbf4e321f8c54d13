"""Norms, rotary embeddings, silu and attention of the library against kernels.reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference, reference_quant
from kernels.kv_rows import KV_TYPES, row_length
from kernels.program import HeadCounts, Pool, QkvExtras, Span

quick = settings(max_examples=20, deadline=None)
ACT = np.dtype([("q", "i1", 32), ("d", "f4"), ("fine", "f4"), ("sum", "f4", 3), ("rest", "i1", 32)])


def as_seen(acts, rows):
    groups = acts.data[:rows].view(ACT)
    values = groups["q"] * groups["d"][..., None]
    values += np.where(groups["fine"][..., None] > 0, groups["rest"], 0) * groups["fine"][..., None]
    return torch.from_numpy(values.reshape(rows, -1))


def assert_quantised(seen, exact):
    """Within a step of the reference's rounding, where float32 may tip a tie."""
    reference_values = reference_quant.quantised(exact)
    steps = exact.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1) / 127
    assert ((seen - reference_values).abs() <= 1.001 * steps + 1e-7).all()
    assert ((seen - reference_values).abs() > 0.01 * steps + 1e-7).float().mean() < 0.02


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@quick
@given(rows=st.integers(1, 5), groups=st.integers(1, 20), seed=st.integers(0, 100))
def test_norm(pool, run, rows, groups, seed):
    x, weight = 5 * numbers(rows, 32 * groups, seed=seed), numbers(32 * groups, seed=seed + 1)

    def add(program):
        source, out = program.floats(32 * groups), program.acts(32 * groups)
        source.data[:] = x
        program.norm(source, weight, 1e-5, out)
        return out

    exact = reference.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-5)
    assert_quantised(as_seen(run(pool, rows, add), rows), exact)


@quick
@given(rows=st.integers(1, 5), groups=st.integers(1, 20), size=st.sampled_from([0.1, 3, 200]))
def test_silu_mul(pool, run, rows, groups, size):
    gate_up = (size * numbers(rows, 64 * groups)).astype(np.float32)

    def add(program):
        source, out = program.floats(64 * groups), program.acts(32 * groups)
        source.data[:] = gate_up
        program.silu_mul(source, out)
        return out

    exact = reference.silu_mul(torch.from_numpy(gate_up))
    assert_quantised(as_seen(run(pool, rows, add), rows), exact)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_embed_and_gather_take_rows_by_number(pool, run, random_matrix, kind):
    table, weights = random_matrix(kind, 50, 512)

    def add(program):
        x, some = program.floats(512), program.floats(512)
        program.embed(table, x)
        program.gather(x, some)
        return x.data, some.data

    x, some = run(pool, 4, add, tokens=[49, 0, 17, 17], drawn=[3, 0])
    assert np.array_equal(x, weights[[49, 0, 17, 17]])
    assert np.array_equal(some[:2], weights[[17, 49]])
    assert np.isnan(some[2:]).all()


def read_cache(cache, dim):
    """What the cache holds, float32 [2, blocks, 16, K, E]."""
    if cache.dtype != np.int8:
        return cache.astype(np.float32)
    steps = cache[..., dim:].copy().view(np.uint16).astype(np.uint32) << 16
    return cache[..., :dim] * steps.view(np.float32)


def poisoned_cache(counts, blocks, dtype):
    """Reads as no number wherever it is not written."""
    row = row_length(dtype, counts.dim)
    nothing = -1 if dtype == "int8" else np.nan  # all bits set: a step that is no number
    return np.full((2, blocks, 16, counts.keys, row), nothing, dtype)


@quick
@given(
    heads=st.sampled_from([(2, 1, 8), (3, 3, 64), (6, 2, 20), (4, 2, 128), (1, 1, 2)]),
    rows=st.integers(1, 20),
    start=st.integers(0, 40),
    extras=st.booleans(),
    dtype=st.sampled_from(list(KV_TYPES)),
    magnitude=st.sampled_from([1.0, 1.25]),
)
def test_rope_finishes_queries_keys_and_values(
    pool, run, heads, rows, start, extras, dtype, magnitude
):
    counts = HeadCounts(*heads)
    width = (counts.queries + 2 * counts.keys) * counts.dim
    qkv = numbers(rows, width)
    bias, q_norm, k_norm = numbers(width), numbers(counts.dim), numbers(counts.dim, seed=1)
    blocks = [5, 2, 0, 4]
    cache = poisoned_cache(counts, 6, dtype)
    frequencies = 1 / 10_000 ** (np.arange(0, counts.dim, 2, dtype=np.float32) / counts.dim)

    def add(program):
        x, angles = program.floats(width), program.floats(counts.dim)
        x.data[:] = qkv
        program.angles(frequencies, angles, magnitude)
        extra = QkvExtras(bias, q_norm, k_norm, 1e-6) if extras else QkvExtras()
        program.rope(x, angles, counts, cache, extra)
        return x.data

    got = torch.from_numpy(run(pool, rows, add, start=start, blocks=blocks))
    x = torch.from_numpy(qkv + bias if extras else qkv).view(rows, -1, counts.dim)
    q, k, v = x.split((counts.queries, counts.keys, counts.keys), dim=1)
    if extras:
        q = reference.rms_norm(q, torch.from_numpy(q_norm), 1e-6)
        k = reference.rms_norm(k, torch.from_numpy(k_norm), 1e-6)
    positions = torch.arange(start, start + rows)
    cos, sin = reference.rope_angles(positions, counts.dim, 10_000.0, magnitude=magnitude)
    q, k = reference.rope(q, cos, sin), reference.rope(k, cos, sin)
    assert torch.allclose(got, torch.cat((q, k, v), 1).flatten(1), atol=2e-5)
    slots = torch.tensor(blocks)[positions // 16] * 16 + positions % 16
    expected = torch.from_numpy(read_cache(poisoned_cache(counts, 6, dtype), counts.dim))
    reference.write_kv(expected, slots, k, v)
    step = float(max(k.abs().max(), v.abs().max())) / 127
    tolerance = {"float32": 2e-5, "float16": 4e-3, "int8": 0.51 * step}
    stored = torch.from_numpy(read_cache(cache, counts.dim))
    assert torch.allclose(stored, expected, atol=tolerance[dtype], equal_nan=True)


@quick
@given(
    dim=st.sampled_from([2, 8, 20, 64, 96]),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 3e5, 1e30]),
    seed=st.integers(0, 100),
)
def test_an_int8_cache_keeps_what_the_reference_does(pool, run, dim, size, seed):
    counts, rows = HeadCounts(1, 3, dim), 5
    qkv = (numbers(rows, 7 * dim, seed=seed) * size).astype(np.float32)
    qkv[2, 2 * dim : 3 * dim] = 0  # the second head's keys
    cache = poisoned_cache(counts, 1, "int8")

    def add(program):
        x, angles = program.floats(7 * dim), program.floats(dim)
        x.data[:] = qkv
        angles.data[:, : dim // 2], angles.data[:, dim // 2 :] = 1, 0  # no turn
        program.rope(x, angles, counts, cache, QkvExtras())

    run(pool, rows, add)
    exact = torch.from_numpy(qkv).view(rows, 7, dim)[:, 1:]
    expected = reference_quant.kv_rounded(exact)
    stored = torch.from_numpy(read_cache(cache, dim))[:, 0, :rows].transpose(0, 1).flatten(1, 2)
    steps = exact.abs().amax(-1, keepdim=True) / 127
    apart = (stored - expected).abs()
    assert (apart <= 1.02 * steps).all(), "where float32 tips a tie"
    assert (apart > 0.01 * steps).float().mean() < 0.01
    assert ((stored - exact).abs() <= 0.505 * steps).all()
    assert (stored[2, 1] == 0).all()


def attend(pool, run, qkv, counts, cache, spans, window=0):
    def add(program):
        x, out = program.floats(qkv.shape[1]), program.floats(counts.queries * counts.dim)
        x.data[:] = qkv
        program.attention(x, counts, cache, out, window)
        return out.data

    return run(pool, len(qkv), add, spans=spans)


def a_cache(counts, blocks, dtype="float32"):
    """Random where sequences may look; not a number in block 0, which belongs to nobody."""
    values = numbers(2, blocks, 16, counts.keys, counts.dim)
    values[:, 0] = np.nan
    if dtype != "int8":
        return values.astype(dtype)
    steps = np.where(np.isnan(values[..., :1]), values[..., :1], np.abs(values[..., :1]) / 127)
    whole = np.random.default_rng(1).integers(-127, 128, values.shape, np.int8)
    upper = (steps.view(np.uint32) >> 16).astype(np.uint16)
    return np.concatenate((whole, upper.view(np.int8)), -1)


@quick
@given(
    heads=st.sampled_from([(2, 1, 8), (3, 3, 64), (6, 2, 20), (8, 2, 128), (9, 3, 64)]),
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 150)), min_size=1, max_size=3),
    dtype=st.sampled_from(list(KV_TYPES)),
    window=st.sampled_from([0, 1, 7, 16, 100]),
    seed=st.integers(0, 100),
)
def test_attention_of_a_ragged_batch(pool, run, heads, lengths, dtype, window, seed):
    counts = HeadCounts(*heads)
    cache = a_cache(counts, 40, dtype)
    shuffled = iter(np.random.default_rng(seed).permutation(np.arange(1, 40)).tolist())
    spans, first = [], 0
    for count, start in lengths:
        blocks = [next(shuffled) for _ in range((start + count + 15) // 16)]
        spans.append(Span(first, count, start, blocks))
        first += count
    width = (counts.queries + 2 * counts.keys) * counts.dim
    qkv = numbers(first, width, seed=seed)
    out = attend(pool, run, qkv, counts, cache, spans, window)
    q = torch.from_numpy(qkv).view(first, -1, counts.dim)[:, : counts.queries]
    keys, values = torch.from_numpy(read_cache(cache, counts.dim))
    for span in spans:
        rows = slice(span.first, span.first + span.count)
        table = torch.tensor(span.blocks)
        expected = reference.prefill_attention(q[rows], keys, values, table, span.start, window)
        assert np.allclose(out[rows], expected.flatten(1), atol=2e-5)


@pytest.mark.parametrize("window", [0, 30])
def test_a_token_attends_the_same_however_its_prompt_is_cut(
    pool, two_threads, run, instruction_set, window
):
    counts, length = HeadCounts(6, 2, 32), 150
    cache = a_cache(counts, 12)
    blocks = [3, 7, 1, 9, 2, 10, 4, 5, 11, 6]
    qkv = numbers(length, 10 * 32)
    whole = attend(pool, run, qkv, counts, cache, [Span(0, length, 0, blocks)], window)
    for cuts in ([0, 149, 150], [0, 16, 40, 41, 129, 150], [0, 64, 128, 150]):
        for first, last in pairwise(cuts):
            span = Span(0, last - first, first, blocks)
            part = attend(two_threads, run, qkv[first:last], counts, cache, [span], window)
            assert np.array_equal(part, whole[first:last])


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("dtype", list(KV_TYPES))
def test_a_token_attends_the_same_however_many_threads_share_its_keys(
    run, instruction_set, window, dtype
):
    counts = HeadCounts(6, 2, 64)
    cache = a_cache(counts, 140, dtype)
    numbered = iter(range(1, 140))
    spans, first = [], 0
    for count, start in ((1, 900), (3, 500), (20, 90), (4, 60), (1, 0)):
        blocks = [next(numbered) for _ in range((start + count + 15) // 16)]
        spans.append(Span(first, count, start, blocks))
        first += count
    qkv = numbers(first, 10 * 64)
    together = [
        attend(Pool(threads, instruction_set), run, qkv, counts, cache, spans, window)
        for threads in (1, 2, 5)
    ]
    assert np.array_equal(together[0], together[1])
    assert np.array_equal(together[0], together[2])
    for span in spans:
        rows = slice(span.first, span.first + span.count)
        alone = Span(0, span.count, span.start, span.blocks)
        out = attend(Pool(2, instruction_set), run, qkv[rows], counts, cache, [alone], window)
        assert np.array_equal(out, together[0][rows])


def test_great_scores_do_not_overflow(pool, run):
    counts = HeadCounts(1, 1, 16)
    cache = a_cache(counts, 8)
    cache[0, 1:] *= 1000
    qkv = 1000 * numbers(1, 48)
    out = attend(pool, run, qkv, counts, cache, [Span(0, 1, 90, [1, 2, 3, 4, 5, 6])])
    keys, values = torch.from_numpy(cache)
    q = torch.from_numpy(qkv)[:, :16].view(1, 1, 16)
    table = torch.tensor([1, 2, 3, 4, 5, 6])
    expected = reference.prefill_attention(q, keys, values, table, 90)
    assert np.allclose(out, expected.flatten(1), atol=1e-5)


def test_sum(pool, run):
    values, sums = np.ones(3 << 18, np.float32), np.full(3, np.nan, np.float32)
    values[-1] = 5
    run(pool, 1, lambda program: program.sum(values, sums))
    assert sums.tolist() == [1 << 18, 1 << 18, (1 << 18) + 4]


def test_sums_of_parts_of_another_size_are_refused(pool, run):
    with pytest.raises(ValueError, match="each is of"):
        run(pool, 1, lambda program: program.sum(np.ones(9, np.float32), np.ones(1, np.float32)))
