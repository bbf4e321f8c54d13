"""Which worker has computed which beginning of a prompt, as far as the router can know.

The router does not tokenise. It cuts what it sees of a prompt into pieces, each hashed together
with the hash of all before it, and remembers to whom it sent which. A worker that reports fewer
cached tokens than expected has dropped the rest: its entries beyond are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.fleet import Worker

# Pieces get longer as the prompt goes on, so that a long one costs few hashes: up to so many
# characters in pieces of such a length. What is beyond the last whole piece is not remembered.
PIECES = ((2048, 256), (16384, 1024), (1 << 62, 4096))
KEYS_MOST = 1 << 16  # remembered of one model
HOLDERS_MOST = 8  # workers remembered of one key: more are not needed to find a good one


class Chain(NamedTuple):
    """A prompt's pieces: `keys[i]` stands for its first `ends[i]` units, characters or tokens.

    The whole prompt has `size` units.
    """

    keys: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    size: int = 0


def chain_of(texts: Iterable[str]) -> Chain:
    """Of a prompt's texts in order, in characters. Roles are texts too."""
    text = "\0".join(texts)
    keys: list[int] = []
    ends: list[int] = []
    start = key = 0
    for limit, length in PIECES:
        while start < limit and start + length <= len(text):
            # Only ever compared within this process, so its own hash does.
            key = hash((key, text[start : start + length]))
            start += length
            keys.append(key)
            ends.append(start)
    return Chain(tuple(keys), tuple(ends), len(text))


class Prefixes:
    """Bounded memory of who holds what: the least recently used goes first."""

    def __init__(self, most: int = KEYS_MOST) -> None:
        self._most = most
        self._holders: OrderedDict[int, list[Worker]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def find(self, chain: Chain) -> dict[Worker, int]:
        """How many units of the prompt each worker holds; those without any are left out."""
        found: dict[Worker, int] = {}
        before: Sequence[Worker] | None = None
        for key, end in zip(chain.keys, chain.ends, strict=True):
            holders = self._holders.get(key)
            if not holders:
                break
            before = holders if before is None else [w for w in holders if w in before]
            if not before:
                break
            found.update((worker, end) for worker in before)
        return found

    def add(self, chain: Chain, worker: Worker) -> None:
        """The worker computes this prompt now."""
        for key in chain.keys:
            holders = self._holders.get(key)
            if holders is None:
                self._holders[key] = [worker]
                continue
            self._holders.move_to_end(key)
            if worker in holders:
                holders.remove(worker)
            elif len(holders) == HOLDERS_MOST:
                del holders[0]
            holders.append(worker)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def forget(self, chain: Chain, worker: Worker, beyond: int) -> None:
        """The worker holds no more than the first `beyond` units."""
        for key, end in zip(chain.keys, chain.ends, strict=True):
            holders = self._holders.get(key)
            if end > beyond and holders and worker in holders:
                holders.remove(worker)
                if not holders:
                    del self._holders[key]
