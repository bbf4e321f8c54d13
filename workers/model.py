"""A decoder of the Llama family over a ragged batch: straight lines, fp32 (`exact` mode).

It knows no ranks, no sequences and no schedule: tokens are flat rows [T, D], and the batch says for
each row its position, its slot in the paged cache, and what it attends to. Where a checkpoint is a
part of a model, `combine` makes the whole of what the parts give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels import reference as ops
from workers.feed_forward import FeedForward, load_feed_forward
from workers.weights.families import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kernels.mark import Mark
    from workers.weights.checkpoint import Weights


@dataclass(frozen=True, slots=True)
class Prefill:
    """Rows [first, last) are one sequence's tokens from position `start` on."""

    first: int
    last: int
    start: int
    table: torch.Tensor  # [n] block numbers, int64


@dataclass(frozen=True, slots=True)
class Decode:
    """Rows that are each the newest token of a sequence of their own."""

    rows: torch.Tensor  # [B] int64
    tables: torch.Tensor  # [B, n] block numbers, int64, padded
    lengths: torch.Tensor  # [B] tokens of the sequence, the newest included, int64


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens. Every row belongs to exactly one prefill or decode."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64, block · 16 + offset
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]
    drawn: torch.Tensor  # [n] int64, the rows whose next token is wanted


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. Matrices are [in, out], so that y = x @ w reads them in order."""

    attention_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [D, (H + 2K)·E]
    qkv_bias: torch.Tensor | None  # [(H + 2K)·E]
    q_norm: torch.Tensor | None  # [E]
    k_norm: torch.Tensor | None  # [E]
    window: int  # tokens that each token sees, 0 for all
    attention_out: torch.Tensor  # [H·E, D]
    ffn_norm: torch.Tensor  # [D]
    ffn: FeedForward


def alone(part: torch.Tensor) -> None:
    """The combination of one part: it is the whole."""


class Layers:
    """A checkpoint's layers, read whenever they are passed through."""

    def __init__(self, checkpoint: Weights, *, keep: bool) -> None:
        """With `keep`, whoever passes through keeps them."""
        self._checkpoint, self._keep = checkpoint, keep

    def __iter__(self) -> Iterator[Layer]:
        numbers = range(self._checkpoint.shape.layers)
        return (_layer(self._checkpoint, number, keep=self._keep) for number in numbers)


class Model:
    """Weights in memory, and the forward pass over them."""

    def __init__(
        self,
        checkpoint: Weights,
        combine: Callable[[torch.Tensor], None] = alone,
        *,
        keep: bool = True,
    ) -> None:
        """`combine` turns a part [T, D] of a layer's output, in place, into the whole.

        Without `keep`, layers are read from the checkpoint for every pass, one at a time, and
        only the experts that are used.
        """
        self._combine = combine
        self.shape = checkpoint.shape
        divisors = self.shape.rope_divisors
        self.rope_divisors = torch.tensor(divisors) if divisors else None  # [E/2]
        layers = Layers(checkpoint, keep=keep)
        self.layers: Iterable[Layer] = list(layers) if keep else layers
        self.norm = _tensor(checkpoint, "model.norm.weight")
        self.head = _tensor(checkpoint, "lm_head.weight").t().contiguous()  # [D, V]
        if self.shape.tied_embeddings or EMBEDDING not in checkpoint.names:
            self.embedding = self.head.t()  # the same memory
        else:
            self.embedding = _tensor(checkpoint, EMBEDDING)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """Write the batch's keys and values, and give the logits [n, V] of its drawn rows.

        cache [L, 2, blocks, 16, K, E].
        """
        return self.logits(self.hidden(batch, cache)[batch.drawn])

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of `hidden` [n, D] -> [n, V]."""
        return self.final(hidden) @ self.head

    @torch.inference_mode()
    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of `hidden` as the head reads them, [n, D]."""
        return ops.rms_norm(hidden, self.norm, self.shape.norm_eps)

    @torch.inference_mode()
    def hidden(
        self,
        batch: Batch,
        cache: torch.Tensor,
        x: torch.Tensor | None = None,
        mark: Mark | None = None,
    ) -> torch.Tensor:
        """Write the batch's keys and values, and give the last layer's output [T, D].

        `x` [T, D] are the tokens' rows of the embedding, where somebody else keeps that. `mark`
        reaches the number of layers whose keys and values are written.
        """
        shape, eps = self.shape, self.shape.norm_eps
        cos, sin = ops.rope_angles(
            batch.positions,
            shape.head_dim,
            shape.rope_theta,
            self.rope_divisors,
            shape.rope_magnitude,
        )
        x = self.embedding[batch.tokens] if x is None else x
        for number, (layer, kv) in enumerate(zip(self.layers, cache, strict=True), 1):
            qkv = ops.rms_norm(x, layer.attention_norm, eps) @ layer.qkv
            attended = self._attention(layer, qkv, cos, sin, kv, batch) @ layer.attention_out
            if mark:
                mark.reach(number)
            self._combine(attended)
            x = x + attended
            fed = layer.ffn.forward(ops.rms_norm(x, layer.ffn_norm, eps))
            self._combine(fed)
            x = x + fed
        return x

    def _attention(
        self,
        layer: Layer,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """qkv [T, (H + 2K)·E] -> [T, H·E], by way of the layer's cache kv [2, blocks, 16, K, E]."""
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        by_head = qkv.view(-1, heads + 2 * kv_heads, self.shape.head_dim)
        q, k, v = torch.split(by_head, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, self.shape.norm_eps)
            k = ops.rms_norm(k, layer.k_norm, self.shape.norm_eps)
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        ops.write_kv(kv, batch.slots, k, v)
        out = torch.empty_like(q)
        for p in batch.prefills:
            rows = slice(p.first, p.last)
            out[rows] = ops.prefill_attention(q[rows], kv[0], kv[1], p.table, p.start, layer.window)
        for d in batch.decodes:
            out[d.rows] = ops.decode_attention(
                q[d.rows], kv[0], kv[1], d.tables, d.lengths, layer.window
            )
        return out.flatten(1)


def _tensor(checkpoint: Weights, name: str) -> torch.Tensor:
    return torch.from_numpy(checkpoint.array(name))


def _layer(checkpoint: Weights, number: int, *, keep: bool) -> Layer:
    """Load one layer; matrices that read the same input become one."""
    shape, prefix = checkpoint.shape, f"model.layers.{number}."
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def joined(names: tuple[str, ...], part: str) -> torch.Tensor:
        return torch.cat([_tensor(checkpoint, f"{prefix}{name}.{part}") for name in names])

    def matrix(*names: str) -> torch.Tensor:
        return joined(names, "weight").t().contiguous()

    def vector(name: str) -> torch.Tensor:
        return _tensor(checkpoint, f"{prefix}{name}.weight")

    return Layer(
        attention_norm=vector("input_layernorm"),
        qkv=matrix(*qkv),
        qkv_bias=joined(qkv, "bias") if shape.qkv_bias else None,
        q_norm=vector("self_attn.q_norm") if shape.qk_norm else None,
        k_norm=vector("self_attn.k_norm") if shape.qk_norm else None,
        window=shape.window if number in shape.window_layers else 0,
        attention_out=matrix("self_attn.o_proj"),
        ffn_norm=vector("post_attention_layernorm"),
        ffn=load_feed_forward(matrix, shape, number, keep=keep),
    )
