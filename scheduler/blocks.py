"""Accounting of KV cache blocks: who holds how many, never where the bytes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.models import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """The blocks of one KV cache, numbered 0 to size - 1, with a reference count each.

    A block that several sequences share (the choices of one prompt) is free when the last of them
    releases it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # popped from the end: low numbers, in runs
        self._references = [0] * size

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `free`."""
        assert count <= self.free, f"{count} blocks asked for, {self.free} free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is shared but free"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Every block is either free once or referenced."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        held = sum(1 for count in self._references if count > 0)
        assert held + self.free == self.size, f"{held} held + {self.free} free != {self.size}"
