"""The fast runner: a step's slices become one call of the CPU kernels, the sampler draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.program import Pool
from kernels.reference import rms_norm
from workers.fast_model import HEAD_ROWS, FastModel
from workers.kv_cache import KvCache
from workers.layout import lay_out
from workers.native import make_draws
from workers.reading import read
from workers.runner import NO_WISHES
from workers.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.batching import Slice
    from workers.runner import Sampled, Wishes
    from workers.weights.checkpoint import Checkpoint

KV_DTYPE = "float16"


class FastRunner:
    """Runner on this machine's CPU, in `fast` mode: for steps of at most `max_rows` rows."""

    def __init__(self, checkpoint: Checkpoint, kv_blocks: int, threads: int, max_rows: int) -> None:
        torch.set_num_threads(threads)
        self.vocab = checkpoint.shape.vocab
        self.cache = KvCache(checkpoint.shape, kv_blocks, KV_DTYPE)
        self.model = FastModel(checkpoint, self.cache, Pool(threads), max_rows)
        self._norm = torch.from_numpy(self.model.norm)

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """See Runner.run."""
        layout = lay_out(slices)
        self.model.program.run(layout.tokens, layout.spans, layout.drawn)
        if wishes.readings:
            hidden = torch.from_numpy(self.model.x.data[: len(layout.tokens)])
            read(slices, hidden, self, wishes.readings)
        logits = torch.from_numpy(self.model.drawn_logits.data[: len(layout.drawn)])
        return sample(logits, make_draws(slices, wishes.masks))

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head.final."""
        return rms_norm(hidden, self._norm, self.model.shape.norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head.logits."""
        assert len(hidden) <= HEAD_ROWS, f"{len(hidden)} rows read at a time"
        return torch.from_numpy(self.model.logits(hidden.numpy()))
