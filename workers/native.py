"""The native runner: a step's slices become index tensors, the model runs, the sampler draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scheduler.blocks import blocks_for
from scheduler.models import BLOCK_TOKENS
from workers.kv_cache import KvCache
from workers.model import Batch, Decode, Model, Prefill
from workers.reading import read
from workers.runner import NO_WISHES
from workers.sampling import Draw, sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from scheduler import batching
    from scheduler.batching import Slice
    from workers.grammar import Mask
    from workers.runner import Sampled, Wishes
    from workers.weights.checkpoint import Checkpoint

GROUP_BLOCKS = 128  # blocks of cache that one call of decode attention reads, unless it is one row


class NativeRunner:
    """Runner on this machine's CPU, in `exact` mode."""

    def __init__(self, checkpoint: Checkpoint, kv_blocks: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = Model(checkpoint)
        self.vocab = self.model.shape.vocab
        self.cache = KvCache(self.model.shape, kv_blocks)
        self._cache = torch.from_numpy(self.cache.data)  # the same memory

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """See Runner.run."""
        batch = make_batch(slices)
        hidden = self.model.hidden(batch, self._cache)
        if wishes.readings:
            read(slices, hidden, self.model, wishes.readings)
        return sample(self.model.logits(hidden[batch.drawn]), make_draws(slices, wishes.masks))


def make_batch(slices: Sequence[Slice]) -> Batch:
    """Lay the slices' tokens out one after another."""
    tokens: list[int] = []
    drawn: list[int] = []
    positions, slots, prefills = [], [], []
    newest: list[tuple[int, Slice]] = []  # row and slice of each single token
    for piece in slices:
        first = len(tokens)
        end = piece.end + len(piece.draft)
        table = torch.tensor(piece.sequence.blocks[: blocks_for(end)])
        place = torch.arange(piece.start, end)
        tokens += piece.tokens
        positions.append(place)
        slots.append(table[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS)
        if end - piece.start == 1:
            newest.append((first, piece))
        else:
            prefills.append(Prefill(first, len(tokens), piece.start, table))
        if piece.choices:
            drawn += range(len(tokens) - 1 - len(piece.draft), len(tokens))
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        prefills=tuple(prefills),
        decodes=tuple(_decodes(newest)),
        drawn=torch.tensor(drawn, dtype=torch.int64),
    )


def make_draws(
    slices: Sequence[Slice], masks: Mapping[batching.Sequence, Mask] = NO_WISHES.masks
) -> list[Draw]:
    """The draws of each slice; those of its choices share a row of logits."""
    draws: list[Draw] = []
    row = 0
    for piece in slices:
        if piece.choices:
            mask, own = masks.get(piece.sequence), piece.sequence.choice
            draws += [_draw(piece, row, choice, 0, mask) for choice in piece.choices]
            drafted = range(1, len(piece.draft) + 1)
            draws += [_draw(piece, row + count, own, count, mask) for count in drafted]
            row += 1 + len(piece.draft)
    return draws


def _draw(piece: Slice, row: int, choice: int, drafted: int, allowed: Mask | None) -> Draw:
    """The draw after so many tokens of the draft."""
    sequence = piece.sequence
    return Draw(
        row=row,
        sampling=sequence.job.sampling,
        prompt_index=sequence.job.prompt_index,
        choice=choice,
        tokens=[*sequence.tokens, *piece.draft[:drafted]] if drafted else sequence.tokens,
        prompt_len=sequence.prompt_len,
        allowed=allowed,
    )


def _decodes(newest: list[tuple[int, Slice]]) -> Iterator[Decode]:
    """Group single tokens by the length of their context."""
    group: list[tuple[int, Slice]] = []
    for row, piece in sorted(newest, key=lambda item: item[1].end):
        width = blocks_for(piece.end)
        if group and not _fits(width, blocks_for(group[0][1].end), len(group) + 1):
            yield _decode(group, blocks_for(group[-1][1].end))
            group = []
        group.append((row, piece))
    if group:
        yield _decode(group, blocks_for(group[-1][1].end))


def _fits(widest: int, narrowest: int, count: int) -> bool:
    """Padding at most doubles a group's reading, and what is read stays in the CPU's cache."""
    return widest <= 2 * narrowest and widest * count <= GROUP_BLOCKS


def _decode(group: list[tuple[int, Slice]], width: int) -> Decode:
    tables = torch.zeros(len(group), width, dtype=torch.int64)
    for table, (_, piece) in zip(tables, group, strict=True):
        blocks = piece.sequence.blocks[: blocks_for(piece.end)]
        table[: len(blocks)] = torch.tensor(blocks)
    return Decode(
        rows=torch.tensor([row for row, _ in group]),
        tables=tables,
        lengths=torch.tensor([piece.end for _, piece in group]),
    )
