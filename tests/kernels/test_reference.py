from __future__ import annotations

import math

import pytest
import torch

from kernels import reference as ops

E = 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def paged(tokens, table, blocks):
    """Put [tokens, K, E] into the blocks that `table` names, out of `blocks` full of rubbish."""
    cache = torch.full((blocks, 16, *tokens.shape[1:]), 1e3)
    for i, token in enumerate(tokens):
        cache[table[i // 16], i % 16] = token
    return cache


def attend_one(q, keys, values):
    """The formula for one query: [H, E] over [S, K, E] -> [H, E], in float64."""
    heads, group = q.shape[0], q.shape[0] // keys.shape[1]
    rows = []
    for h in range(heads):
        k, v = keys[:, h // group].double(), values[:, h // group].double()
        rows.append(torch.softmax(k @ q[h].double() / math.sqrt(E), 0) @ v)
    return torch.stack(rows).float()


def test_rms_norm_gives_rows_of_unit_mean_square_times_weight():
    x, weight = torch.randn(5, 32) * 7, torch.randn(32)
    normed = ops.rms_norm(x, weight, eps=0.0) / weight
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(5), **CLOSE)
    expected = torch.nn.functional.rms_norm(x, (32,), weight, 0.1)
    torch.testing.assert_close(ops.rms_norm(x, weight, 0.1), expected, **CLOSE)


def test_rope_multiplies_each_pair_as_a_complex_number_by_its_phase():
    x, positions = torch.randn(4, 3, E), torch.tensor([0, 1, 17, 4000])
    pairs = torch.complex(x[..., : E // 2], x[..., E // 2 :])
    frequency = torch.tensor([10000.0 ** (-2 * i / E) for i in range(E // 2)])
    angle = (positions[:, None] * frequency)[:, None].expand(4, 3, E // 2)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    got = ops.rope(x, *ops.rope_angles(positions, E, 10000.0))
    torch.testing.assert_close(got, expected, **CLOSE)


def test_rope_makes_products_depend_on_distance_alone():
    q, k = torch.randn(1, 1, E), torch.randn(1, 1, E)

    def product(at_q, at_k):
        turn = [ops.rope_angles(torch.tensor([at]), E, 100.0) for at in (at_q, at_k)]
        return (ops.rope(q, *turn[0]) * ops.rope(k, *turn[1])).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)


def test_silu_mul_takes_the_gate_from_the_first_half():
    gate, up = torch.randn(3, 6), torch.randn(3, 6)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(ops.silu_mul(torch.cat((gate, up), -1)), expected, **CLOSE)


def test_write_kv_fills_its_slots_and_nothing_else():
    cache = torch.zeros(2, 3, 16, 2, E)
    keys, values = torch.randn(2, 2, E), torch.randn(2, 2, E)
    ops.write_kv(cache, torch.tensor([2 * 16 + 5, 15]), keys, values)
    assert torch.equal(cache[0, 2, 5], keys[0])
    assert torch.equal(cache[0, 0, 15], keys[1])
    assert torch.equal(cache[1, 2, 5], values[0])
    assert torch.equal(cache[1, 0, 15], values[1])
    cache[:, 2, 5] = cache[:, 0, 15] = 0
    assert not cache.any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    ("start", "tokens"), [(0, 1), (0, 16), (0, 37), (5, 30), (16, 16), (40, 2)]
)
def test_prefill_attention_lets_each_token_see_itself_and_the_past(heads, kv_heads, start, tokens):
    end = start + tokens
    keys, values = torch.randn(2, end, kv_heads, E)
    q = torch.randn(tokens, heads, E)
    table = torch.tensor([5, 0, 3][: -(-end // 16)])
    got = ops.prefill_attention(q, paged(keys, table, 7), paged(values, table, 7), table, start)
    for t in range(tokens):
        seen = start + t + 1
        torch.testing.assert_close(got[t], attend_one(q[t], keys[:seen], values[:seen]), **CLOSE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_decode_attention_sees_its_own_length_whatever_the_padding(heads, kv_heads):
    lengths = [1, 16, 17, 40]
    tables = torch.tensor([[9, 9, 9], [4, 0, 0], [2, 7, 1], [8, 3, 5]])
    q = torch.randn(4, heads, E)
    keys, values = torch.randn(2, 4, 40, kv_heads, E)
    key_cache = torch.full((10, 16, kv_heads, E), 1e3)
    value_cache = key_cache.clone()
    for row, length in enumerate(lengths):
        for i in range(length):
            key_cache[tables[row, i // 16], i % 16] = keys[row, i]
            value_cache[tables[row, i // 16], i % 16] = values[row, i]
    got = ops.decode_attention(q, key_cache, value_cache, tables, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        expected = attend_one(q[row], keys[row, :length], values[row, :length])
        torch.testing.assert_close(got[row], expected, **CLOSE)


@pytest.mark.parametrize("window", [1, 7, 16, 17, 40, 60])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 37), (5, 30), (16, 16), (40, 5)])
def test_prefill_attention_with_a_window_sees_only_its_last_tokens(window, start, tokens):
    end = start + tokens
    keys, values = torch.randn(2, end, 2, E)
    q = torch.randn(tokens, 4, E)
    table = torch.tensor([5, 0, 3][: -(-end // 16)])
    paged_kv = paged(keys, table, 7), paged(values, table, 7)
    got = ops.prefill_attention(q, *paged_kv, table, start, window)
    for t in range(tokens):
        seen = slice(max(0, start + t + 1 - window), start + t + 1)
        torch.testing.assert_close(got[t], attend_one(q[t], keys[seen], values[seen]), **CLOSE)


@pytest.mark.parametrize("window", [1, 7, 16, 17, 33, 60])
def test_decode_attention_with_a_window_sees_only_its_last_tokens(window):
    lengths, tables = [1, 16, 33, 40], torch.tensor([[9, 9, 9], [4, 0, 0], [2, 7, 1], [8, 3, 5]])
    q, (keys, values) = torch.randn(4, 4, E), torch.randn(2, 4, 48, 2, E)
    cache = [torch.full((10, 16, 2, E), 1e3) for _ in range(2)]
    for row, length in enumerate(lengths):
        for part, tokens in zip(cache, (keys, values), strict=True):
            for i in range(length):
                part[tables[row, i // 16], i % 16] = tokens[row, i]
    got = ops.decode_attention(q, *cache, tables, torch.tensor(lengths), window)
    for row, length in enumerate(lengths):
        seen = slice(max(0, length - window), length)
        expected = attend_one(q[row], keys[row, seen], values[row, seen])
        torch.testing.assert_close(got[row], expected, **CLOSE)


def test_stretched_angles_turn_slower_and_grow():
    positions, divisors = torch.tensor([3, 8000]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    cos, sin = ops.rope_angles(positions, E, 100.0, divisors, magnitude=1.5)
    for i, divisor in enumerate(divisors.tolist()):
        plain_cos, plain_sin = ops.rope_angles(positions.double() / divisor, E, 100.0)
        torch.testing.assert_close(cos[:, i], 1.5 * plain_cos[:, i], rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(sin[:, i], 1.5 * plain_sin[:, i], rtol=1e-3, atol=2e-3)


def test_a_token_is_routed_to_its_likeliest_experts():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).log()  # probabilities 0, 1/2, 1/6, 1/3
    weights, experts = ops.route(logits, 2, sum_to_one=False)
    assert experts.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 2, 1 / 3]]))
    weights, _ = ops.route(logits, 2, sum_to_one=True)
    torch.testing.assert_close(weights, torch.tensor([[3 / 5, 2 / 5]]))
