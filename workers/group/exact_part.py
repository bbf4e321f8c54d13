"""One rank's part of a model by torch in float32 (`exact` mode)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workers.kv_cache import KvCache
from workers.layout import Layout
from workers.model import Model
from workers.native import make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.program import Span
    from workers.group.part import Array, Combine
    from workers.weights.checkpoint import Checkpoint, Weights


class ExactPart:
    """See Part."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sharded: Weights,
        kv_blocks: int,
        threads: int,
        combine: Combine,
        *,
        keep: bool,
    ) -> None:
        """Without `keep`, layers are read from the checkpoint for every step, one at a time."""
        torch.set_num_threads(threads)
        self._checkpoint = checkpoint
        self._model = Model(sharded, lambda part: combine(part.numpy()), keep=keep)
        self.cache = KvCache(sharded.shape, kv_blocks)
        self._data = torch.from_numpy(self.cache.data)  # the same memory

    def run(self, x: Array, spans: Sequence[Span], drawn: Sequence[int]) -> tuple[Array, Array]:
        batch = make_batch(Layout([0] * len(x), list(spans), list(drawn)))
        hidden = self._model.hidden(batch, self._data, torch.from_numpy(x))
        return hidden.numpy(), self._model.logits(hidden[batch.drawn]).numpy()

    def logits(self, hidden: Array) -> Array:
        return self._model.logits(torch.from_numpy(hidden)).numpy()

    def close(self) -> None:
        self._checkpoint.close()
