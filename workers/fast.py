"""The fast runner: a step's slices become one call of the CPU kernels, the sampler draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.program import Pool
from workers.fast_model import HEAD_ROWS, FastModel
from workers.kv_cache import KvCache
from workers.layout import lay_out, make_draws
from workers.reading import read, rms_norm
from workers.runner import NO_WISHES
from workers.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.batching import Slice
    from workers.kv_cache import KvDtype
    from workers.reading import Array
    from workers.runner import Sampled, Wishes
    from workers.weights.checkpoint import Checkpoint


class FastRunner:
    """Runner on this machine's CPU, in `fast` mode: for steps of at most `max_rows` rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kv_blocks: int,
        threads: int,
        max_rows: int,
        kv_dtype: KvDtype = "float16",
    ) -> None:
        self.vocab = checkpoint.shape.vocab
        self.numbers = f"fast mode, weights {checkpoint.quantisation}"
        self.cache = KvCache(checkpoint.shape, kv_blocks, kv_dtype)
        self.model = FastModel(checkpoint, self.cache, Pool(threads), max_rows)
        self._sampler = Sampler()

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """See Runner.run."""
        layout = lay_out(slices)
        self.model.program.run(layout.tokens, layout.spans, layout.drawn)
        if wishes.readings:
            read(slices, self.model.x.data[: len(layout.tokens)], self, wishes.readings)
        logits = self.model.drawn_logits.data[: len(layout.drawn)]
        return self._sampler.sample(logits, make_draws(slices, wishes.masks))

    def final(self, hidden: Array) -> Array:
        """See Head.final."""
        return rms_norm(hidden, self.model.norm, self.model.shape.norm_eps)

    def logits(self, hidden: Array) -> Array:
        """See Head.logits."""
        assert len(hidden) <= HEAD_ROWS, f"{len(hidden)} rows read at a time"
        return self.model.logits(hidden)
