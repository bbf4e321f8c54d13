"""A step's slices as rows one after another, and the draws from them: the same for every runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernels.program import Span
from scheduler.blocks import blocks_for
from workers.runner import NO_WISHES
from workers.sampling import Draw

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scheduler import batching
    from scheduler.batching import Slice
    from scheduler.request import TokenIds
    from workers.grammar import Mask


@dataclass(slots=True)
class Layout:
    """T rows, each of one token."""

    tokens: TokenIds = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # every row is in exactly one
    drawn: list[int] = field(default_factory=list)  # rows whose next token is wanted


def lay_out(slices: Iterable[Slice]) -> Layout:
    """Rows in the order of the slices; a draft's rows come after its sequence's."""
    layout = Layout()
    for piece in slices:
        rows, first = piece.tokens, len(layout.tokens)
        blocks = piece.sequence.blocks[: blocks_for(piece.start + len(rows))]
        layout.spans.append(Span(first, len(rows), piece.start, blocks))
        layout.tokens += rows
        if piece.choices:
            layout.drawn += range(len(layout.tokens) - 1 - len(piece.draft), len(layout.tokens))
    return layout


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
