"""Weights that stay in memory, and weights that are read anew for every step.

As much as fits stays; what does not is spread evenly over the step, so that the disk never idles
while the rest is computed (TPI-LLM's sliding window, §3.3, of bytes instead of blocks). A thread
reads ahead into a ring of memory; the step waits for a weight only if it is not there yet.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.group.memory import ring_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from workers.group.shard_file import Entry

    Array = np.ndarray[Any, np.dtype[np.uint8]]

logger = logging.getLogger(__name__)

WAIT_S = 600.0  # for one weight; a disk that takes longer is broken
REQUEST = 8 << 20  # bytes of one read: more than 1 MiB saturates a disk


def choose_streamed(sizes: Sequence[int], budget: int) -> list[int]:
    """Indices of the weights to stream so that the others and the ring fit into `budget` bytes.

    Raises ValueError if not even the ring fits.
    """
    if sum(sizes) <= budget:
        return []
    ring = ring_bytes(sizes)
    if ring > budget:
        raise ValueError(f"{budget} bytes are left for weights, and the window takes {ring}")
    return evenly(sizes, budget - ring)


def evenly(sizes: Sequence[int], budget: int) -> list[int]:
    """Indices of those to leave out so that the others take no more than `budget` bytes.

    By error diffusion over the execution order: after any number of weights the bytes that are
    left out are the same share of all, within one weight.
    """
    total = sum(sizes)
    if total <= budget:
        return []
    share = (total - budget) / total
    owed, streamed = 0.0, []
    for index, size in enumerate(sizes):
        owed += size * share
        if owed >= size / 2:
            streamed.append(index)
            owed -= size
    resident = total - sum(sizes[index] for index in streamed)
    for index in sorted(set(range(len(sizes))) - set(streamed), key=lambda i: sizes[i]):
        if resident <= budget:
            break
        resident -= sizes[index]
        streamed.append(index)
    return sorted(streamed)


class Stream:
    """The ring, its reader, and who has read how far.

    Weights are numbered in the order of a step: `need(0)` … `need(n - 1)`, `end()`, and again.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], size: int, *, direct: bool) -> None:
        """Read `entries` of a shard file in turn into a ring of `size` bytes.

        `direct` goes past the page cache where the file system allows that.
        """
        self.entries = entries
        self.bytes_read = 0
        self._memory = mmap.mmap(-1, size)
        self._ring = np.frombuffer(self._memory, np.uint8)
        self._places = _places([entry.padded for entry in entries], size)
        self._waits = _waits(self._places, [entry.padded for entry in entries])
        self._file = open_file(path, direct=direct)
        self._news = threading.Condition()
        self._loaded = 0  # weights, counted over all steps
        self._consumed = 0
        self._error: OSError | None = None
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="weights", daemon=True)
        self._reader.start()

    def view(self, number: int) -> Array:
        """Where a weight is while it is needed."""
        start = self._places[number]
        return self._ring[start : start + self.entries[number].size]

    def need(self, number: int) -> None:
        """All before it are done with; wait until it is there. Raises OSError, TimeoutError."""
        with self._news:
            step = self._consumed // len(self.entries)
            wanted = step * len(self.entries) + number
            if self._consumed != wanted:
                self._consumed = wanted
                self._news.notify_all()
            self._news.wait_for(lambda: self._loaded > wanted or self._error, WAIT_S)
            if self._error:
                raise self._error
            if self._loaded <= wanted:
                raise TimeoutError(f"{self.entries[number].name} was not read in {WAIT_S:.0f} s")

    def end(self) -> None:
        """The step is over: the next one's first weights may take the place of its last."""
        with self._news:
            self._consumed = (self._consumed // len(self.entries) + 1) * len(self.entries)
            self._news.notify_all()

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._reader.join()
        os.close(self._file)

    def _read(self) -> None:
        number = 0
        while True:
            index = number % len(self.entries)
            free = number - self._waits[index] + 1
            with self._news:
                self._news.wait_for(lambda: self._closed or self._consumed >= free)  # noqa: B023
                if self._closed:
                    return
            try:
                self._fill(index)
            except OSError as error:
                with self._news:
                    self._error = error
                    self._news.notify_all()
                return
            number += 1
            with self._news:
                self._loaded = number
                self._news.notify_all()

    def _fill(self, index: int) -> None:
        entry, start = self.entries[index], self._places[index]
        read_at(self._file, entry, memoryview(self._memory)[start : start + entry.padded])
        self.bytes_read += entry.padded


def read_at(file: int, entry: Entry, place: memoryview) -> None:
    """One weight, with what is behind it up to the next, into its place."""
    done = 0
    while done < entry.padded:
        count = os.preadv(file, [place[done : done + REQUEST]], entry.offset + done)
        if not count:
            raise OSError(errno.EIO, f"{entry.name} is cut off: make the shard anew")
        done += count


def load(path: Path, entry: Entry) -> Array:
    """One weight, to stay in memory; its pages are not left in the page cache."""
    data = np.frombuffer(mmap.mmap(-1, max(1, entry.size)), np.uint8)[: entry.size]
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        view, done = data.data, 0
        while done < entry.size:
            count = file.readinto(view[done : done + REQUEST])
            if not count:
                raise OSError(errno.EIO, f"{path} is cut off in {entry.name}: make it anew")
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), entry.offset, entry.size, os.POSIX_FADV_DONTNEED)
    return data


def open_file(path: Path, *, direct: bool) -> int:
    """A descriptor to read from; `direct` goes past the page cache where that can be."""
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            logger.warning("%s cannot be read past the page cache", path)
    file = os.open(path, os.O_RDONLY)
    if direct and hasattr(os, "F_NOCACHE"):
        import fcntl

        fcntl.fcntl(file, getattr(fcntl, "F_NOCACHE"), 1)  # noqa: B009  # of macOS only
    return file


def _places(sizes: Sequence[int], ring: int) -> list[int]:
    """Where in the ring each goes: one behind the other, and never over its end."""
    places, position = [], 0
    for size in sizes:
        if position + size > ring:
            position = 0
        places.append(position)
        position += size
    return places


def _waits(places: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many weights before each, in endless turns, the newest that it overwrites was read."""
    count = len(places)

    def overlap(a: int, b: int) -> bool:
        return places[a] < places[b] + sizes[b] and places[b] < places[a] + sizes[a]

    return [
        next(back for back in range(1, count + 1) if overlap(index, (index - back) % count))
        for index in range(count)
    ]
