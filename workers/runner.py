"""What the engine asks of whatever computes: the one seam between scheduling and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.batching import Slice
    from workers.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token. `logprob` and `top` (best first) only where the job asked for logprobs."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Runner(Protocol):
    """Computes slices: writes their KV into `cache` and draws the tokens that follow them."""

    cache: KvCache
    vocab: int  # V: token ids are 0 to V - 1

    def run(self, slices: Sequence[Slice]) -> list[Sampled]:
        """One Sampled for each choice of each slice, in that order (see Slice.choices)."""
        ...
