"""Memory that two ranks of one host share, for the long messages of their link.

Each direction has an area that fills from its beginning and begins anew once the other side has
read all of it, so that short sums touch few pages. The link's socket carries a header that says
where a message lies, and what found no room after it: nobody ever waits for room. Who dies is
noticed by the socket; the memory has no name, and goes with the last process that has it open.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from scheduler.errors import ProtocolError
from workers import host_memory
from workers.group.words import Memory

if TYPE_CHECKING:
    from types import TracebackType

AREA = 1 << 20  # of each direction
LEAST = 64 << 10  # bytes of a message; what is shorter is faster over loopback alone
HEADER = struct.Struct("=II")  # where it begins in the area, how many of its bytes lie there
SIZE = mmap.PAGESIZE + 2 * AREA
_LINE = 64  # the counters' distance, so that neither side's writes disturb the other's


class Passage:
    """One side of it; both directions are used by the link's thread only."""

    def __init__(self, memory: mmap.mmap, side: int) -> None:
        """`side`: 0 for the maker, 1 for the other."""
        areas = np.frombuffer(memory, np.uint8, 2 * AREA, mmap.PAGESIZE).reshape(2, AREA)
        counters = np.frombuffer(memory, np.uint64, 2 * _LINE // 8, _LINE)[:: _LINE // 8]
        self._out, self._in = areas[side], areas[1 - side]
        self._read_by_them, self._read_by_us = counters[side:][:1], counters[1 - side :][:1]
        self._written = self._read = 0  # bytes since the beginning
        self._end = 0  # of what they have not read

    def put(self, view: memoryview) -> tuple[memoryview, memoryview]:
        """A message's header, and what of it found no room."""
        if int(self._read_by_them[0]) == self._written:
            self._end = 0
        start, count = self._end, min(len(view), AREA - self._end)
        self._out[start : start + count] = np.frombuffer(view, np.uint8)[:count]
        self._end += count
        self._written += count
        return memoryview(HEADER.pack(start, count)), view[count:]

    def take(self, header: bytearray, view: memoryview) -> memoryview:
        """Fill the view from its beginning; what is left of it comes by the socket.

        Raises ProtocolError for a header that is none.
        """
        start, count = HEADER.unpack(header)
        if start + count > AREA or count > len(view):
            raise ProtocolError("a rank says that a message lies outside of its memory")
        np.frombuffer(view, np.uint8)[:count] = self._in[start : start + count]
        self._read += count
        self._read_by_us[0] = self._read
        return view[count:]


class Offer:
    """A passage that this side made; open for the other one as long as this context lasts."""

    def __init__(self, descriptor: int, memory: Memory | None, passage: Passage | None) -> None:
        self.memory, self.passage, self._descriptor = memory, passage, descriptor

    @classmethod
    def of_this_host(cls, *, wanted: bool) -> Offer:
        """Empty if it is not wanted, or not to be had."""
        if not (wanted and host_memory.host()):
            return cls(-1, None, None)
        try:
            descriptor, memory, nonce = host_memory.make("motley-link", SIZE)
        except OSError:
            return cls(-1, None, None)
        place = Memory(host_memory.host(), os.getpid(), descriptor, nonce)
        return cls(descriptor, place, Passage(memory, 0))

    def __enter__(self) -> Offer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.memory:
            os.close(self._descriptor)


def attach(place: Memory) -> Passage | None:
    """The other side of an offer; None if it is of another host, or cannot be opened."""
    if not host_memory.host() or place.host != host_memory.host():
        return None
    try:
        memory = host_memory.attach(place.process, place.descriptor, place.nonce, SIZE)
    except OSError:
        return None
    return Passage(memory, 1)
