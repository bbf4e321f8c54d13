"""What the engine asks of whatever computes: the one seam between scheduling and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scheduler import batching
    from scheduler.batching import Slice
    from workers.grammar import Mask
    from workers.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token. `logprob` and `top` (best first) only where the job asked for logprobs."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Reading:
    """What is read off a prompt while it passes, chunk by chunk."""

    top: int | None = None  # score its tokens, with so many alternatives beside each
    embed: bool = False
    embedding: bytes = b""  # [D] float32: the last token's hidden state, of length 1
    scores: list[Sampled] = field(default_factory=list)  # of its second token, its third, …

    def take(self, start: int, scores: list[Sampled]) -> None:
        """The tokens after position `start` on. A prompt that is computed anew is read anew."""
        self.scores[start:] = scores


@dataclass(frozen=True, slots=True)
class Wishes:
    """What some of the sequences want beyond plain draws."""

    readings: Mapping[batching.Sequence, Reading] = field(default_factory=dict)
    masks: Mapping[batching.Sequence, Mask] = field(default_factory=dict)  # what may be drawn


NO_WISHES = Wishes()


class CacheLost(Exception):
    """A step failed, and the whole cache with it; the runner itself can go on."""


class Runner(Protocol):
    """Computes slices: writes their KV into `cache` and draws the tokens that follow them."""

    cache: KvCache
    vocab: int  # V: token ids are 0 to V - 1
    numbers: str  # mode and weights in words, equal where two of them may be interchanged

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """The draws of each slice, in order: one a choice, then one after each draft token.

        Each is drawn as if the draft before it were right (see Slice.draws). Raises CacheLost where
        everything is to be computed anew.
        """
        ...
