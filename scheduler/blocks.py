"""Accounting of KV cache blocks: who holds how many and what is in them, never the bytes.

A block that is full has a name: the hash of its tokens and of all tokens before them. A block whose
last holder is gone keeps its content until its place is needed, oldest first, so a prompt that
begins like an earlier one (a system prompt, the turns so far) finds that part already computed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from scheduler.models import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


def block_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block, given the name of the one before it (empty for the first).

    Cryptographic, since a client who could make two prefixes collide would read another's answer.
    """
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """The blocks of one KV cache, numbered 0 to size - 1, with a reference count each.

    A block is held (references > 0), idle (free, but its content has a name) or blank (free).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._blank = list(range(size - 1, -1, -1))  # popped from the end: low numbers, in runs
        self._idle: OrderedDict[int, None] = OrderedDict()  # next to be reused first
        self._references = [0] * size
        self._names: dict[int, bytes] = {}  # of full blocks, held or idle
        self._named: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `free`."""
        assert count <= self.free, f"{count} blocks asked for, {self.free} free"
        taken = sorted(
            self._blank.pop() if self._blank else self._evict() for _ in range(count)
        )  # neighbours are read, written and sent in one piece
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, held or idle."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._idle, f"block {block} is shared but free"
                del self._idle[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of one sequence, given in its order.

        Its end becomes idle before its beginning: that is the part which fewer others share.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def name(self, block: int, name: bytes) -> None:
        """The block is full and computed: from now on `find` finds it."""
        assert self._references[block] > 0, f"block {block} is named but free"
        if name not in self._named and block not in self._names:
            self._names[block] = name
            self._named[name] = block

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of `names` whose every block is here."""
        found = []
        for name in names:
            if (block := self._named.get(name)) is None:
                break
            found.append(block)
        return found

    def forget(self) -> None:
        """What the blocks contain is lost: none has a name any more."""
        self._blank += self._idle
        self._idle.clear()
        self._names.clear()
        self._named.clear()

    def check_integrity(self) -> None:
        """Every block is held, idle or blank, and names lead back to their blocks."""
        free = [*self._blank, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert not any(self._references[block] for block in free), "a free block is held"
        held = sum(1 for count in self._references if count > 0)
        assert held + self.free == self.size, f"{held} held + {self.free} free != {self.size}"
        assert {b: n for n, b in self._named.items()} == self._names, "names do not match"
        assert all(block in self._names for block in self._idle), "an idle block has no name"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block
