"""What a model is to a planner: its shape, and the bytes and operations that follow from it."""

from __future__ import annotations

import msgspec

BLOCK_TOKENS = 16  # tokens in one block of KV cache, everywhere


class ModelShape(msgspec.Struct, frozen=True):
    """A decoder of the Llama family; symbols as in the docs: L D H K E F V."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool

    @property
    def parameters(self) -> int:
        """Number of weights, norms included."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        tables = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * layer + tables + self.hidden

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """2·L·K·E elements: a key and a value in each layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes
