"""The native runner: a step's rows become index tensors, the model runs, the sampler draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scheduler.models import BLOCK_TOKENS
from workers.kv_cache import KvCache
from workers.layout import lay_out, make_draws
from workers.model import Batch, Decode, Model, Prefill
from workers.reading import read
from workers.runner import NO_WISHES
from workers.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kernels.program import Span
    from scheduler.batching import Slice
    from workers.layout import Layout
    from workers.reading import Array
    from workers.runner import Sampled, Wishes
    from workers.weights.checkpoint import Checkpoint

GROUP_BLOCKS = 128  # blocks of cache that one call of decode attention reads, unless it is one row


class NativeRunner:
    """Runner on this machine's CPU, in `exact` mode."""

    def __init__(self, checkpoint: Checkpoint, kv_blocks: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = Model(checkpoint)
        self.vocab = self.model.shape.vocab
        self.numbers = f"exact mode, weights {checkpoint.quantisation}"
        self.cache = KvCache(self.model.shape, kv_blocks)
        self._cache = torch.from_numpy(self.cache.data)  # the same memory
        self._sampler = Sampler()

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """See Runner.run."""
        batch = make_batch(lay_out(slices))
        hidden = self.model.hidden(batch, self._cache, mark=self.cache.mark)
        if wishes.readings:
            read(slices, hidden.numpy(), self, wishes.readings)
        logits = self.model.logits(hidden[batch.drawn])
        return self._sampler.sample(logits.numpy(), make_draws(slices, wishes.masks))

    def final(self, hidden: Array) -> Array:
        """See Head.final."""
        return self.model.final(torch.from_numpy(hidden)).numpy()

    def logits(self, hidden: Array) -> Array:
        """See Head.logits."""
        return self.model.logits(torch.from_numpy(hidden)).numpy()


def make_batch(layout: Layout) -> Batch:
    """The same rows as index tensors."""
    positions, slots, prefills = [], [], []
    newest: list[Span] = []  # of a single token each
    for span in layout.spans:
        table = torch.tensor(span.blocks)
        place = torch.arange(span.start, span.start + span.count)
        positions.append(place)
        slots.append(table[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS)
        if span.count == 1:
            newest.append(span)
        else:
            prefills.append(Prefill(span.first, span.first + span.count, span.start, table))
    return Batch(
        tokens=torch.tensor(layout.tokens),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        prefills=tuple(prefills),
        decodes=tuple(_decodes(newest)),
        drawn=torch.tensor(layout.drawn, dtype=torch.int64),
    )


def _decodes(newest: list[Span]) -> Iterator[Decode]:
    """Group single tokens by the length of their context."""
    group: list[Span] = []
    for span in sorted(newest, key=lambda span: span.start):
        if group and not _fits(len(span.blocks), len(group[0].blocks), len(group) + 1):
            yield _decode(group)
            group = []
        group.append(span)
    if group:
        yield _decode(group)


def _fits(widest: int, narrowest: int, count: int) -> bool:
    """Padding at most doubles a group's reading, and what is read stays in the CPU's cache."""
    return widest <= 2 * narrowest and widest * count <= GROUP_BLOCKS


def _decode(group: list[Span]) -> Decode:
    """Of spans whose last has the longest context."""
    tables = torch.zeros(len(group), len(group[-1].blocks), dtype=torch.int64)
    for table, span in zip(tables, group, strict=True):
        table[: len(span.blocks)] = torch.tensor(span.blocks)
    return Decode(
        rows=torch.tensor([span.first for span in group]),
        tables=tables,
        lengths=torch.tensor([span.start + 1 for span in group]),
    )
