"""A shard file in use: some of its weights in memory, the others passing through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.program import Matrix
from scheduler.errors import SetupError
from workers.fast_model import FastModel
from workers.group.memory import streamable
from workers.group.shard_file import DATA, Manifest
from workers.group.stream import Stream, choose_streamed, load, ring_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from kernels.program import Pool
    from workers.fast_model import Combine
    from workers.kv_cache import KvCache
    from workers.weights.gguf_header import StoredTensor


class Shard:
    """Weights (see there) of a shard file, and how much of them is read anew for every step."""

    def __init__(self, folder: Path, manifest: Manifest, budget: int, *, direct: bool) -> None:
        """Keep within `budget` bytes. Raises SetupError if that is too little for any window."""
        self.shape = manifest.shape
        self._path = folder / DATA
        self._entries = {entry.name: entry for entry in manifest.entries}
        may_pass = [entry for entry in manifest.entries if streamable(entry.name, entry.dims)]
        sizes = [entry.padded for entry in may_pass]
        fixed = sum(entry.padded for entry in manifest.entries) - sum(sizes)
        try:
            chosen = choose_streamed(sizes, budget - fixed)
        except ValueError:
            missing = fixed + ring_bytes(sizes) - budget
            raise SetupError(
                f"the memory cap leaves {budget >> 20} MiB for weights, which is "
                f"{(missing >> 20) + 1} MiB too little: raise the cap, lower --kv-tokens, or add a "
                "rank"
            ) from None
        streamed = [may_pass[index] for index in chosen]
        self._numbers = {entry.name: number for number, entry in enumerate(streamed)}
        self.streamed_bytes = sum(entry.padded for entry in streamed)
        self.total_bytes = fixed + sum(sizes)
        self.stream: Stream | None = None
        if streamed:
            self.stream = Stream(self._path, streamed, ring_bytes(sizes), direct=direct)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A vector."""
        return load(self._path, self._entries[name]).view(np.float32)

    def stored(self, name: str) -> StoredTensor | None:
        """Its matrices are packed; see `matrix`."""
        return None

    def matrix(self, name: str) -> tuple[Matrix, int | None]:
        """The matrix, and its number if it is there only after `stream.need` of that."""
        entry, number = self._entries[name], self._numbers.get(name)
        if number is None or self.stream is None:
            data: np.ndarray[Any, Any] = load(self._path, entry)
        else:
            data = self.stream.view(number)
        outputs, inputs = entry.dims
        return Matrix.packed(entry.kind, outputs, inputs, data), number

    def close(self) -> None:
        if self.stream:
            self.stream.close()


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
