"""One rank's part of a model, ready to compute: rows of the embedding in, its logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kernels.program import Pool, Span
from workers.allocator import keep_freed_memory
from workers.fast_model import FastModel
from workers.group.sharded import Sharded
from workers.kv_cache import KvCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from workers.group.partition import Share
    from workers.kv_cache import KvDtype
    from workers.weights.checkpoint import Checkpoint

    Array = np.ndarray[Any, np.dtype[np.float32]]
    Combine = Callable[[Array], None]


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


class FastPart:
    """By the CPU kernels (`fast` mode)."""

    def __init__(
        self, checkpoint: Sharded, cache: KvCache, threads: int, max_rows: int, combine: Combine
    ) -> None:
        self.cache = cache
        self._model = FastModel(checkpoint, cache, Pool(threads), max_rows, combine)

    def run(self, x: Array, spans: Sequence[Span], drawn: Sequence[int]) -> tuple[Array, Array]:
        model, rows = self._model, len(x)
        model.x.data[:rows] = x
        model.program.run([0] * rows, spans, drawn)
        return model.x.data[:rows], model.drawn_logits.data[: len(drawn)]

    def logits(self, hidden: Array) -> Array:
        return self._model.logits(hidden)


def load_part(
    checkpoint: Checkpoint,
    share: Share,
    *,
    mode: str,
    kv_dtype: KvDtype,
    kv_blocks: int,
    threads: int,
    max_rows: int,
    combine: Combine,
) -> Part:
    """`kv_dtype` is `fast` mode's. `combine` sums a flat float32 array over the ranks, in place."""
    sharded = Sharded(checkpoint, share)

    def whole(part: Array) -> None:
        combine(part.reshape(-1))

    if mode == "fast":
        cache = KvCache(sharded.shape, kv_blocks, kv_dtype)
        return FastPart(sharded, cache, threads, max_rows, whole)
    from workers.group.exact_part import ExactPart  # with torch, which a fast rank does without

    keep_freed_memory()
    return ExactPart(sharded, kv_blocks, threads, whole)
