"""The bytes of a paged KV cache: [L, 2, blocks, 16, K, E], keys at 0 and values at 1.

Kept by numpy so that workers without torch (the fake one) have the same cache; torch shares the
memory. A layer's keys of neighbouring blocks are contiguous, so a transfer is a few long views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scheduler.models import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scheduler.models import ModelShape


class KvCache:
    """Storage for `blocks` blocks of a model's keys and values."""

    def __init__(self, shape: ModelShape, blocks: int, dtype: str = "float32") -> None:
        self.layers, self.kv_heads, self.head_dim = shape.layers, shape.kv_heads, shape.head_dim
        self.blocks = blocks
        self.data = np.zeros(  # zeros are mapped lazily: blocks never used take no memory
            (self.layers, 2, blocks, BLOCK_TOKENS, self.kv_heads, self.head_dim), dtype
        )

    @property
    def dtype(self) -> str:
        """numpy's name of the element type."""
        return self.data.dtype.name

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer."""
        for source, target in pairs:
            self.data[:, :, target] = self.data[:, :, source]

    def views(self, blocks: list[int], tokens: int, layers: range) -> list[memoryview]:
        """The first `tokens` tokens of a sequence, as byte views in the order of the wire.

        Concatenated they are [layers, 2, tokens, K, E]; a sender reads them, a receiver fills them.
        """
        width = self.kv_heads * self.head_dim
        runs = list(_runs(blocks, tokens))
        return [
            self.data[layer, part, first : first + count]
            .reshape(-1)[: length * width]
            .view(np.uint8)
            .data
            for layer in layers
            for part in (0, 1)
            for first, count, length in runs
        ]


def _runs(blocks: list[int], tokens: int) -> Iterator[tuple[int, int, int]]:
    """Group neighbouring block numbers: (first block, blocks, tokens) of each run."""
    start = 0
    while start < len(blocks) and tokens > 0:
        end = start + 1
        while end < len(blocks) and blocks[end] == blocks[end - 1] + 1:
            end += 1
        length = min(tokens, (end - start) * BLOCK_TOKENS)
        yield blocks[start], end - start, length
        tokens -= length
        start = end
