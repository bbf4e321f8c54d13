"""A prompt whose KV is to be pushed: what of it is in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.batching import Sequence
    from scheduler.messages import FirstToken


@dataclass(slots=True)
class Held:
    """It is computed and waits here: tokens [0, tokens) in `blocks`."""

    blocks: list[int]
    tokens: int
    firsts: tuple[FirstToken, ...]  # of the choices that go on; empty: all have finished
    generation: int = 0  # of the cache

    def current(self) -> bool:
        """Nobody takes its blocks from it."""
        return True


@dataclass(frozen=True, slots=True)
class Ready:
    """Seen while it is computed: tokens [0, tokens) of all layers, [tokens, end) of the first."""

    sequence: Sequence
    blocks: list[int]
    tokens: int
    end: int
    layers: int  # that have the tokens up to `end`
    generation: int  # of the cache

    def current(self) -> bool:
        """False once the sequence was preempted: its blocks may already hold another's tokens."""
        return self.sequence.blocks is self.blocks
