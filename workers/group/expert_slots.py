"""Experts that do not fit into memory: each is read when a row of the step has chosen it.

Who is chosen is known only in the middle of a layer, so nothing can be read ahead; in return the
experts of a token are but a few of all. A layer's experts that are not in memory take turns in the
slots, which all layers share: in a round as many as there are slots, of which those that no row has
chosen are not read.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.group.memory import slots_bytes
from workers.group.stream import open_file, read_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kernels.buffers import Routing
    from workers.group.shard_file import Entry

    Array = np.ndarray[Any, np.dtype[np.uint8]]


class ExpertSlots:
    """Places in memory for matrices of experts, and their reader."""

    def __init__(self, path: Path, sizes: Sequence[int], *, direct: bool) -> None:
        """`path` is a shard file, `sizes` are those (padded) of the matrices to come."""
        self.bytes_read = 0
        self.width = max(sizes)
        self.count = slots_bytes(sizes) // self.width
        self._memory = mmap.mmap(-1, self.count * self.width)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._file = open_file(path, direct=direct)

    def view(self, number: int, entry: Entry) -> Array:
        """Where the layer's `number`th matrix that is not in memory is after its round's `load`."""
        start = number % self.count * self.width
        return self._bytes[start : start + entry.size]

    def rounds(self, absent: Sequence[int], experts: int) -> list[tuple[range, list[int]]]:
        """The layer's experts, all of them, in ranges that lack no more than there are slots."""
        firsts = range(0, len(absent), self.count)
        bounds = [0, *(absent[first] for first in firsts[1:]), experts]
        return [
            (range(bounds[number], bounds[number + 1]), list(absent[first : first + self.count]))
            for number, first in enumerate(firsts)
        ]

    def loader(
        self, routing: Routing, part: Routing, experts: range, entries: dict[int, Entry]
    ) -> Callable[[int], None]:
        """What a program calls before a round: then `part` is the routing to these experts.

        `entries` are those that are not in memory, by expert, in the order of their slots.
        """

        def load(rows: int) -> None:
            part.restrict(routing, experts)
            for slot, (expert, entry) in enumerate(entries.items()):
                if part.rows_of(expert):
                    start = slot * self.width
                    place = memoryview(self._memory)[start : start + entry.padded]
                    read_at(self._file, entry, place)
                    self.bytes_read += entry.padded

        return load

    def close(self) -> None:
        os.close(self._file)
