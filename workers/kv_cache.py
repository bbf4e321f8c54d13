"""The bytes of a paged KV cache: [L, 2, blocks, 16, K, E], keys at 0 and values at 1.

An int8 cache has 2 bytes more after each E: the step that the values count in (kernels/kv_rows.py).

Kept by numpy so that workers without torch (the fake one) have the same cache; torch shares the
memory. A layer's keys of neighbouring blocks are contiguous, so a transfer is a few long views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from kernels.kv_rows import row_length
from kernels.mark import Mark
from scheduler.models import BLOCK_TOKENS
from workers.allocator import lazy_zeros

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scheduler.models import ModelShape

KvDtype: TypeAlias = Literal["float16", "int8"]  # that `fast` mode has a choice of


class KvPiece(NamedTuple):
    """Tokens of one sequence in some layers: [layers, 2, tokens, K, E] on the wire."""

    blocks: list[int]  # of the sequence
    tokens: range
    layers: range
    generation: int = 0  # of the cache that keeps them, see there


class KvCache:
    """Storage for `blocks` blocks of a model's keys and values."""

    def __init__(self, shape: ModelShape, blocks: int, dtype: str = "float32") -> None:
        self.layers, self.kv_heads, self.head_dim = shape.layers, shape.kv_heads, shape.head_dim
        self.blocks = blocks
        row = row_length(dtype, self.head_dim)
        self.data = lazy_zeros(
            (self.layers, 2, blocks, BLOCK_TOKENS, self.kv_heads, row), np.dtype(dtype)
        )
        self._slots = self.data.reshape(self.layers, 2, blocks * BLOCK_TOKENS, -1)  # a token each
        self.mark = Mark()  # layers that have the tokens of the step that runs

    @property
    def generation(self) -> int:
        """Another one once everything in it was lost (see workers.runner.CacheLost)."""
        return 0

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self._slots.shape[-1] * self.data.itemsize

    @property
    def numbers(self) -> int:
        """In one token's keys, or values, of one layer."""
        return self.kv_heads * self.head_dim

    @property
    def dtype(self) -> str:
        """numpy's name of the element type."""
        return self.data.dtype.name

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer."""
        for source, target in pairs:
            self.data[:, :, target] = self.data[:, :, source]

    async def taken(self, piece: KvPiece) -> list[memoryview]:
        """Its bytes, to be sent. Raises HandoffFailed if they are lost."""
        return self.views(piece.blocks, piece.tokens, piece.layers)

    def room(self, piece: KvPiece) -> list[memoryview]:
        """Where its bytes may be received."""
        return self.views(piece.blocks, piece.tokens, piece.layers)

    async def keep(self, piece: KvPiece, room: list[memoryview]) -> None:
        """Its room is filled. Raises HandoffFailed if what it belongs to is lost."""

    def views(self, blocks: list[int], tokens: range, layers: range) -> list[memoryview]:
        """These tokens of a sequence, as byte views in the order of the wire.

        Concatenated they are [layers, 2, tokens, K, E]; a sender reads them, a receiver fills them.
        """
        runs = list(_runs(blocks, tokens))
        return [
            self._slots[layer, part, first:last].reshape(-1).view(np.uint8).data
            for layer in layers
            for part in (0, 1)
            for first, last in runs
        ]


def _runs(blocks: list[int], tokens: range) -> Iterator[tuple[int, int]]:
    """The slots of these tokens, [first, last) of each run of neighbours."""
    start = tokens.start
    while start < tokens.stop:
        index = start // BLOCK_TOKENS
        last = index + 1
        while last * BLOCK_TOKENS < tokens.stop and blocks[last] == blocks[last - 1] + 1:
            last += 1
        end = min(tokens.stop, last * BLOCK_TOKENS)
        first = blocks[index] * BLOCK_TOKENS + start % BLOCK_TOKENS
        yield first, first + end - start
        start = end
