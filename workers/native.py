"""The native runner: a step's slices become index tensors, the model runs, the sampler draws."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from scheduler.blocks import blocks_for
from scheduler.models import BLOCK_TOKENS
from workers.kv_cache import KvCache
from workers.model import Batch, Decode, Model, Prefill
from workers.sampling import Draw, sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.batching import Slice
    from workers.model import Weights
    from workers.runner import Sampled


class NativeRunner:
    """Runner on this machine's CPU, in `exact` mode."""

    def __init__(self, checkpoint: Weights, kv_blocks: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = Model(checkpoint)
        self.cache = KvCache(self.model.shape, kv_blocks)
        self._cache = torch.from_numpy(self.cache.data)  # the same memory

    def run(self, slices: Sequence[Slice]) -> list[Sampled]:
        """One Sampled for each choice of each slice, in that order (see Slice.choices)."""
        logits = self.model.forward(make_batch(slices), self._cache)
        return sample(logits, make_draws(slices))


def make_batch(slices: Sequence[Slice]) -> Batch:
    """Lay the slices' tokens out one after another."""
    tokens: list[int] = []
    drawn: list[int] = []
    positions, slots, prefills = [], [], []
    newest: list[tuple[int, Slice]] = []  # row and slice of each single token
    for piece in slices:
        first = len(tokens)
        table = torch.tensor(piece.sequence.blocks[: blocks_for(piece.end)])
        place = torch.arange(piece.start, piece.end)
        tokens += piece.sequence.tokens[piece.start : piece.end]
        positions.append(place)
        slots.append(table[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS)
        if piece.end - piece.start == 1:
            newest.append((first, piece))
        else:
            prefills.append(Prefill(first, len(tokens), piece.start, table))
        if piece.choices:
            drawn.append(len(tokens) - 1)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        prefills=tuple(prefills),
        decodes=tuple(_decodes(newest)),
        drawn=torch.tensor(drawn, dtype=torch.int64),
    )


def make_draws(slices: Sequence[Slice]) -> list[Draw]:
    """The draws of each slice's choices; those of one slice share its row of logits."""
    drawing = [piece for piece in slices if piece.choices]
    return [
        Draw(
            row=row,
            sampling=piece.sequence.job.sampling,
            prompt_index=piece.sequence.job.prompt_index,
            choice=choice,
            tokens=piece.sequence.tokens,
            prompt_len=piece.sequence.prompt_len,
        )
        for row, piece in enumerate(drawing)
        for choice in piece.choices
    ]


def _decodes(newest: Iterable[tuple[int, Slice]]) -> Iterable[Decode]:
    """Group single tokens by the size of their context, within a factor of two.

    Tables of a group are padded to its longest, so padding at most doubles what is read.
    """
    groups: defaultdict[int, list[tuple[int, Slice]]] = defaultdict(list)
    for row, piece in newest:
        groups[blocks_for(piece.end).bit_length()].append((row, piece))
    for group in groups.values():
        width = max(blocks_for(piece.end) for _, piece in group)
        tables = torch.zeros(len(group), width, dtype=torch.int64)
        for table, (_, piece) in zip(tables, group, strict=True):
            blocks = piece.sequence.blocks[: blocks_for(piece.end)]
            table[: len(blocks)] = torch.tensor(blocks)
        yield Decode(
            rows=torch.tensor([row for row, _ in group]),
            tables=tables,
            lengths=torch.tensor([piece.end for _, piece in group]),
        )
