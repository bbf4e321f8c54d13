"""KV between two workers of one host: memory that the receiver makes and the sender writes.

The receiver keeps SLOTS slots for each connection in memory of workers.host_memory.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from scheduler.messages import KvMemory
from workers.host_memory import attach, make
from workers.kv_wire import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    See = Callable[[memoryview], None]

SLOTS = 4  # one is written while the others are read
PIECE_BYTES = 64 << 10


class SharedMemory:
    """Slots of CHUNK_BYTES, after a page with the nonce."""

    def __init__(self, memory: mmap.mmap, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._map = memory

    def write(self, slot: int, views: Sequence[memoryview], see: See) -> None:
        """Put byte views into a slot, one after another. `see` sees what is written."""
        with memoryview(self._map) as memory:
            for at, piece in self._pieces(slot, views):
                here = memory[at : at + piece.nbytes]
                here[:] = piece
                see(here)

    def read(self, slot: int, views: Sequence[memoryview], see: See) -> None:
        """Fill byte views from a slot. `see` sees what they hold then."""
        with memoryview(self._map) as memory:
            for at, piece in self._pieces(slot, views):
                piece[:] = memory[at : at + piece.nbytes]
                see(piece)

    def _pieces(self, slot: int, views: Sequence[memoryview]) -> Iterator[tuple[int, memoryview]]:
        """The views piece by piece, each with its place: what was copied is seen in the cache."""
        at = mmap.PAGESIZE + slot * self.slot_bytes
        for view in views:
            for start in range(0, view.nbytes, PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                yield at, piece
                at += piece.nbytes

    def close(self) -> None:
        self._map.close()


class OwnMemory(SharedMemory):
    """The receiver's: it makes the file, and says where it is."""

    def __init__(self) -> None:
        """Raises OSError if this system has no such files, or no memory."""
        size = mmap.PAGESIZE + SLOTS * CHUNK_BYTES
        self._descriptor, memory, nonce = make("motley-kv", size)
        super().__init__(memory, SLOTS, CHUNK_BYTES)
        self.place = KvMemory(os.getpid(), self._descriptor, SLOTS, CHUNK_BYTES, nonce)

    def close(self) -> None:
        super().close()
        os.close(self._descriptor)


class PeerMemory(SharedMemory):
    """The sender's view of it."""

    def __init__(self, place: KvMemory) -> None:
        """Raises OSError if it is not to be had, or is another's."""
        size = mmap.PAGESIZE + place.slots * place.slot_bytes
        memory = attach(place.process, place.descriptor, place.nonce, size)
        super().__init__(memory, place.slots, place.slot_bytes)
        self.place = place
        self._free = list(range(place.slots))

    def take(self) -> int | None:
        """A slot that the receiver has read, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        if 0 <= slot < self.slots and slot not in self._free:
            self._free.append(slot)
