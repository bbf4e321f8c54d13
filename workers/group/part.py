"""One rank's part of a model, ready to compute: rows of the embedding in, its logits out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kernels.program import Pool, Span
from scheduler.errors import SetupError
from workers.allocator import keep_freed_memory
from workers.fast_model import FastModel
from workers.group.memory import step_bytes, used_bytes
from workers.group.shard import Shard, ShardModel
from workers.group.shard_file import Manifest, read_manifest, write_shard
from workers.group.sharded import cut
from workers.installed import engine_installed
from workers.kv_cache import KvCache
from workers.weights.checkpoint import open_checkpoint
from workers.weights.random_model import PREFIX as RANDOM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from workers.group.partition import Share
    from workers.group.shard_folder import ShardFolder
    from workers.kv_cache import KvDtype

    Array = np.ndarray[Any, np.dtype[np.float32]]
    Combine = Callable[[Array], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The part that a formation asks of a rank."""

    share: Share
    mode: Literal["fast", "exact"]
    quantize: Literal["int4", "int8"] | None
    path: str  # of the model
    kv_dtype: KvDtype  # of `fast` mode
    kv_blocks: int
    max_rows: int


@dataclass(frozen=True, slots=True)
class Means:
    """What a rank computes it with."""

    threads: int
    shards: ShardFolder  # for ranks with a cap, or without the model
    memory_cap: int | None = None  # bytes of the whole process; None: all weights stay in memory
    direct: bool = True  # read past the page cache


class Part(Protocol):
    """Shapes: T rows of a step, n drawn rows, V_r rows of the vocabulary that this rank holds."""

    cache: KvCache

    def run(self, x: Array, spans: Sequence[Span], drawn: Sequence[int]) -> tuple[Array, Array]:
        """x [T, D] -> the last layer's output [T, D], and the drawn rows' logits [n, V_r].

        Both are valid until the next call.
        """
        ...

    def logits(self, hidden: Array) -> Array:
        """[n, D] -> [n, V_r], for at most workers.fast_model.HEAD_ROWS rows."""
        ...

    def close(self) -> None:
        """Let go of threads and files."""
        ...


class FastPart:
    """By the CPU kernels (`fast` mode)."""

    def __init__(self, model: FastModel, cache: KvCache, shard: Shard | None) -> None:
        self.cache = cache
        self.shard = shard  # None where all weights stay in memory
        self._model = model

    def run(self, x: Array, spans: Sequence[Span], drawn: Sequence[int]) -> tuple[Array, Array]:
        model, rows = self._model, len(x)
        model.x.data[:rows] = x
        model.program.run([0] * rows, spans, drawn)
        return model.x.data[:rows], model.drawn_logits.data[: len(drawn)]

    def logits(self, hidden: Array) -> Array:
        return self._model.logits(hidden)

    def close(self) -> None:
        if self.shard:
            self.shard.close()


def load_part(
    wanted: Wanted,
    means: Means,
    combine: Combine,
    fetched: tuple[Path, Manifest] | None = None,
) -> Part:
    """From the model's file, or from a shard that was `fetched`, by which a rank also computes
    that keeps all its weights in memory.

    `combine` sums a flat float32 array over the ranks, in place. Raises SetupError.
    """

    def whole(part: Array) -> None:
        combine(part.reshape(-1))

    if wanted.mode == "fast" and (fetched or means.memory_cap is not None):
        return _from_shard(wanted, means, whole, *(fetched or make_shard(wanted, means)))
    if fetched:
        raise SetupError("a shard holds packed weights, which `--mode exact` cannot compute with")
    checkpoint = open_checkpoint(Path(wanted.path), wanted.quantize)
    sharded = cut(checkpoint, wanted.share)
    if wanted.mode == "fast":
        cache = KvCache(sharded.shape, wanted.kv_blocks, wanted.kv_dtype)
        model = FastModel(sharded, cache, Pool(means.threads), wanted.max_rows, whole)
        checkpoint.close()
        return FastPart(model, cache, None)
    with engine_installed():
        from workers.group.exact_part import ExactPart  # with torch, which a fast rank does without

    keep_freed_memory()
    keep = means.memory_cap is None
    return ExactPart(checkpoint, sharded, wanted.kv_blocks, means.threads, whole, keep=keep)


def _from_shard(
    wanted: Wanted, means: Means, combine: Combine, folder: Path, manifest: Manifest
) -> Part:
    """Under a cap, what does not fit into memory passes through."""
    shape = manifest.shape
    cache = KvCache(shape, wanted.kv_blocks, wanted.kv_dtype)
    budget = manifest.size
    if means.memory_cap is not None:
        taken = used_bytes() + cache.data.nbytes + step_bytes(shape, wanted.max_rows)
        budget = means.memory_cap - taken
    shard = Shard(folder, manifest, budget, direct=means.direct)
    logger.info(
        "%d MiB of weights, %d %% of them read anew for every step, %d %% where rows choose them",
        shard.total_bytes >> 20,
        round(100 * shard.streamed_bytes / shard.total_bytes),
        round(100 * shard.chosen_bytes / shard.total_bytes),
    )
    try:
        model = ShardModel(shard, cache, Pool(means.threads), wanted.max_rows, combine)
    except BaseException:
        shard.close()
        raise
    return FastPart(model, cache, shard)


def make_shard(wanted: Wanted, means: Means) -> tuple[Path, Manifest]:
    """This share's shard file, written now if it is not there."""
    source = f"{_identity(Path(wanted.path))} {wanted.quantize} {wanted.share}"
    folder = means.shards.claim(source)
    with means.shards.writing(folder):
        if manifest := read_manifest(folder, source):
            return folder, manifest
        logger.info("writing a rank's weights to %s", folder)
        checkpoint = open_checkpoint(Path(wanted.path), wanted.quantize)
        try:
            return folder, write_shard(cut(checkpoint, wanted.share), folder, source)
        finally:
            checkpoint.close()


def _identity(path: Path) -> str:
    """A model file by what changes when it changes. Raises SetupError if it is not there."""
    if str(path).startswith(RANDOM):
        return str(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    try:
        stats = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise SetupError(f"{path}: {error}") from error
    return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
