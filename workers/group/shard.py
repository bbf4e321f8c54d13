"""A shard file in use: some of its weights in memory, the others passing through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.program import Matrix
from scheduler.errors import SetupError
from workers.fast_model import FastModel
from workers.group.expert_slots import ExpertSlots
from workers.group.memory import is_expert, ring_bytes, slots_bytes, streamable
from workers.group.shard_file import DATA, Manifest
from workers.group.stream import Stream, choose_streamed, evenly, load

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from kernels.buffers import Acts, Floats, Routing
    from kernels.program import Pool
    from workers.fast_model import Combine
    from workers.group.shard_file import Entry
    from workers.kv_cache import KvCache
    from workers.weights.gguf_header import StoredTensor


class Shard:
    """Weights (see there) of a shard file, and how much of them is read anew for every step."""

    def __init__(self, folder: Path, manifest: Manifest, budget: int, *, direct: bool) -> None:
        """Keep within `budget` bytes. Raises SetupError if that is too little for any window."""
        self.shape = manifest.shape
        self._path = folder / DATA
        self._entries = {entry.name: entry for entry in manifest.entries}
        self.total_bytes = sum(entry.padded for entry in manifest.entries)
        streamed, chosen = _absent(manifest, budget)
        self._numbers = {entry.name: number for number, entry in enumerate(streamed)}
        self._chosen = {entry.name for entry in chosen}
        self.streamed_bytes = sum(entry.padded for entry in streamed)
        self.chosen_bytes = sum(entry.padded for entry in chosen)  # read as far as rows choose them
        self.stream: Stream | None = None
        self.slots: ExpertSlots | None = None
        if streamed:
            sizes = [e.padded for e in manifest.entries if streamable(e.name, e.dims)]
            self.stream = Stream(self._path, streamed, ring_bytes(sizes), direct=direct)
        if chosen:
            sizes = [entry.padded for entry in chosen]
            self.slots = ExpertSlots(self._path, sizes, direct=direct)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def bytes_read(self) -> int:
        """For steps so far."""
        return sum(reader.bytes_read for reader in (self.stream, self.slots) if reader)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A vector, or a router."""
        entry = self._entries[name]
        return load(self._path, entry).view(np.float32).reshape(entry.dims)

    def stored(self, name: str) -> StoredTensor | None:
        """Its matrices are packed; see `matrix`."""
        return None

    def absent(self, name: str) -> Entry | None:
        """Where to read this matrix of an expert, if it is not in memory."""
        return self._entries[name] if name in self._chosen else None

    def matrix(self, name: str) -> tuple[Matrix, int | None]:
        """The matrix, and its number if it is there only after `stream.need` of that."""
        entry, number = self._entries[name], self._numbers.get(name)
        if number is None or self.stream is None:
            return packed(entry, load(self._path, entry)), None
        return packed(entry, self.stream.view(number)), number

    def close(self) -> None:
        for reader in (self.stream, self.slots):
            if reader:
                reader.close()


class ShardModel(FastModel):
    """A model over a shard: it waits for the weights that pass through."""

    def __init__(
        self, shard: Shard, cache: KvCache, pool: Pool, max_rows: int, combine: Combine
    ) -> None:
        self._shard = shard
        super().__init__(shard, cache, pool, max_rows, combine)
        if stream := shard.stream:
            self.program.call(lambda rows: stream.end())

    def _matrix(self, name: str) -> Matrix:
        matrix, number = self._shard.matrix(name)
        stream = self._shard.stream
        if stream and number is not None:
            self.program.call(lambda rows: stream.need(number))
        return matrix

    def _expert_products(
        self, prefix: str, name: str, x: Acts, routing: Routing, out: Floats
    ) -> None:
        """In rounds, each with the experts for which there are slots."""
        names = [f"{prefix}.{expert}.{name}.weight" for expert in range(self.shape.experts)]
        found = ((expert, self._shard.absent(each)) for expert, each in enumerate(names))
        absent = {expert: entry for expert, entry in found if entry}
        slots = self._shard.slots
        if not absent or not slots:
            super()._expert_products(prefix, name, x, routing, out)
            return
        places = {e: slots.view(number, entry) for number, (e, entry) in enumerate(absent.items())}
        matrices = [
            packed(absent[e], places[e]) if e in absent else self._matrix(each)
            for e, each in enumerate(names)
        ]
        for experts, missing in slots.rounds(list(absent), len(names)):
            part = routing.part()
            entries = {expert: absent[expert] for expert in missing}
            self.program.call(slots.loader(routing, part, experts, entries))
            self.program.expert_matmul(matrices, x, part, out)


def packed(entry: Entry, data: np.ndarray[Any, Any]) -> Matrix:
    outputs, inputs = entry.dims
    return Matrix.packed(entry.kind, outputs, inputs, data)


def _absent(manifest: Manifest, budget: int) -> tuple[list[Entry], list[Entry]]:
    """What does not fit into memory: weights to be streamed, and experts to be read when chosen.

    Experts first, since a token takes but a few of them. Raises SetupError if not even what
    passes through fits.
    """
    dense = [entry for entry in manifest.entries if streamable(entry.name, entry.dims)]
    experts = [entry for entry in manifest.entries if is_expert(entry.name)]
    sizes, expert_sizes = ([entry.padded for entry in part] for part in (dense, experts))
    room = budget - (manifest.size - sum(sizes) - sum(expert_sizes))
    if sum(sizes) + sum(expert_sizes) <= room:
        return [], []
    room -= slots_bytes(expert_sizes)
    try:
        streamed = choose_streamed(sizes, room)
    except ValueError:
        missing = ring_bytes(sizes) - room
        raise SetupError(
            f"the memory cap leaves {max(0, budget) >> 20} MiB for weights, which is "
            f"{(missing >> 20) + 1} MiB too little: raise the cap, lower --kv-tokens, or add a "
            "rank"
        ) from None
    chosen = evenly(expert_sizes, 0 if streamed else room - sum(sizes))
    return [dense[index] for index in streamed], [experts[index] for index in chosen]
