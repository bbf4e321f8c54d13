"""The operations of a Llama layer in plain torch: these functions define what each one means.

A faster version of one has its name and signature, and is tested against it. Nothing here knows of
sequences, schedules or ranks. Shapes: T tokens, B sequences, D hidden, H query heads, K kv heads
(H is a multiple of K; query head h reads kv head h // (H / K)), E head dim, F ffn. A layer's paged
keys or values are [blocks, 16, K, E]: block b holds the 16 tokens that some table names by b.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

BLOCK_TOKENS = 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019, eq. 4).

    x [..., D], weight [D] -> [..., D].
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_angles(
    positions: torch.Tensor,
    head_dim: int,
    theta: float,
    divisors: torch.Tensor | None = None,
    magnitude: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position · theta^(-2i/E), for i in 0..E/2 (Su et al. 2021, eq. 15).

    Models whose context was stretched divide each frequency by a number of its own, divisors
    [E/2], and multiply cosine and sine by `magnitude` (Peng et al. 2023, YaRN, §3).
    positions [T] -> two tensors [T, E/2], computed once a step and shared by all layers.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if divisors is not None:
        frequencies = frequencies / divisors
    angles = positions[:, None].float() * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + E/2]) by its angle: the "rotate half" pairing.

    x [T, heads, E], cos and sin [T, E/2] -> [T, heads, E].
    """
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (Shazeer 2020, SwiGLU without its matrices). [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def route(
    logits: torch.Tensor, experts_used: int, sum_to_one: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights: the largest of softmax(logits) (Jiang et al. 2024).

    With `sum_to_one` the weights are divided by their sum, which is a softmax over the chosen ones.
    logits [T, experts] -> weights [T, experts_used], experts [T, experts_used] int64.
    """
    weights, experts = logits.softmax(-1).topk(experts_used)
    if sum_to_one:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def write_kv(
    cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Store each token's key and value in its slot, block · 16 + offset in the block.

    cache [2, blocks, 16, K, E], slots [T], keys and values [T, K, E].
    """
    flat = cache.flatten(1, 2)
    flat[0].index_copy_(0, slots, keys)
    flat[1].index_copy_(0, slots, values)


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    start: int,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of one sequence's tokens start .. start + T over its tokens 0 .. start + T.

    softmax(q·kᵀ / √E) · v, where token t sees the keys of tokens <= t, its own included, and of
    these only the last `window` unless it is 0 (Jiang et al. 2023, Mistral, §2); all of them are in
    the cache already. q [T, H, E], keys and values [blocks, 16, K, E], table [n] block numbers in
    order, 16·n >= start + T -> [T, H, E].
    """
    tokens = q.shape[0]
    if window:  # blocks that no token sees are not read
        unseen = max(0, start + 1 - window) // BLOCK_TOKENS
        table, start = table[unseen:], start - unseen * BLOCK_TOKENS
    end = start + tokens
    whole = start == 0 and not 0 < window < tokens  # this mask is built in, skipping what it hides
    mask = None if whole else torch.ones(tokens, end, dtype=torch.bool).tril(start)
    if mask is not None and window:
        mask.triu_(start - window + 1)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, H, T, E]
        _gather(keys, table[None])[:, :, :end],  # [1, K, end, E]
        _gather(values, table[None])[:, :, :end],
        attn_mask=mask,
        is_causal=whole,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    window: int = 0,
) -> torch.Tensor:
    """Attention of the newest token of each of B sequences over that sequence's tokens.

    q [B, H, E], keys and values [blocks, 16, K, E], tables [B, n] block numbers (rows of shorter
    sequences are padded with any valid block), lengths [B] tokens to see, the newest included, and
    of these only the last `window` unless it is 0 -> [B, H, E].
    """
    batch, heads, head_dim = q.shape
    kv_heads = keys.shape[2]
    if window:
        tables, lengths = _last_blocks(tables, lengths, window)
    k, v = _gather(keys, tables), _gather(values, tables)  # [B, K, n·16, E]
    place = torch.arange(k.shape[2])
    seen = place < lengths[:, None]  # [B, n·16]
    if window:
        seen &= place >= lengths[:, None] - window
    # One new token each, so the query heads that share a kv head can stand as its rows.
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None])
    return out.reshape(batch, heads, head_dim)


def _last_blocks(
    tables: torch.Tensor, lengths: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables without the blocks that lie before each row's window, and lengths to match."""
    unseen = (lengths - window).clamp_(min=0) // BLOCK_TOKENS  # [B]
    reach = (window + 2 * BLOCK_TOKENS - 2) // BLOCK_TOKENS  # blocks that a window can touch
    columns = unseen[:, None] + torch.arange(min(reach, tables.shape[1]))
    kept = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
    return kept, lengths - unseen * BLOCK_TOKENS


def _gather(paged: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The tokens of each row of tables: [blocks, 16, K, E], [B, n] -> [B, K, n·16, E]."""
    batch, n = tables.shape
    blocks = paged.flatten(1).index_select(0, tables.flatten())
    return blocks.view(batch, n * paged.shape[1], *paged.shape[2:]).transpose(1, 2)
