"""What a model is to a planner: its shape, and the bytes and operations that follow from it."""

from __future__ import annotations

import msgspec

BLOCK_TOKENS = 16  # tokens in one block of KV cache, everywhere


class ModelShape(msgspec.Struct, frozen=True):
    """A decoder of the Llama family; symbols as in the docs: L D H K E F V.

    A zero or an empty tuple means that the model has no such thing.
    """

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
    qkv_bias: bool = False
    qk_norm: bool = False  # each query and key head is normalised before it is rotated
    rope_divisors: tuple[float, ...] = ()  # E/2: what each pair's rotary frequency is divided by
    rope_magnitude: float = 1.0  # what cosines and sines are multiplied by
    window: int = 0  # tokens that a windowed layer sees, the newest included
    window_layers: tuple[int, ...] = ()
    experts: int = 0
    experts_used: int = 0  # per token
    expert_ffn: int = 0  # F of one expert
    expert_layers: tuple[int, ...] = ()  # these have experts in place of the dense feed-forward
    expert_weights_sum_to_one: bool = True  # of the experts used, not of all

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases included."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        dense = 3 * self.hidden * self.ffn * (self.layers - len(self.expert_layers))
        experts = self.experts * (3 * self.hidden * self.expert_ffn + self.hidden)
        tables = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        layers = self.layers * (attention + biases + norms)
        return layers + dense + len(self.expert_layers) * experts + tables + self.hidden

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """2·L·K·E elements: a key and a value in each layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes
