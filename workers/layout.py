"""A step's slices as rows one after another: what every runner makes of them first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernels.program import Span
from scheduler.blocks import blocks_for

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.batching import Slice
    from scheduler.request import TokenIds


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
