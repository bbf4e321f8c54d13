"""What is read off a prompt's rows beside the token that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from workers.runner import Sampled
from workers.sampling import largest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy.typing as npt

    from scheduler import batching
    from scheduler.batching import Slice
    from workers.runner import Reading

Array: TypeAlias = "npt.NDArray[np.float32]"

ROWS = 16  # logits of so many rows exist at a time: 16 × 128,000 × 4 bytes = 8 MB


class Head(Protocol):
    """The end of a model, after its last layer."""

    def final(self, hidden: Array) -> Array:
        """Normalised as the vocabulary's matrix reads it: [n, D] -> [n, D]."""
        ...

    def logits(self, hidden: Array) -> Array:
        """[n, D] -> [n, V], for at most ROWS rows."""
        ...


def rms_norm(hidden: Array, weight: Array, eps: float) -> Array:
    """The same as kernels.reference.rms_norm, where torch is not: [n, D] -> [n, D]."""
    mean = np.square(hidden).mean(-1, keepdims=True)
    normed: Array = hidden / np.sqrt(mean + eps) * weight
    return normed


def read(
    slices: Iterable[Slice],
    hidden: Array,
    head: Head,
    readings: Mapping[batching.Sequence, Reading],
) -> None:
    """Fill `readings` with what the slices' rows, hidden [T, D] one after another, say of them."""
    row = 0
    for piece in slices:
        reading = readings.get(piece.sequence)
        if reading and reading.top is not None:
            # The row of position p says what comes at p + 1.
            end = min(piece.end + 1, piece.sequence.prompt_len)
            targets = piece.sequence.tokens[piece.start + 1 : end]
            rows = hidden[row : row + len(targets)]
            reading.take(piece.start, score(rows, head.logits, targets, reading.top))
        if reading and reading.embed and piece.end == piece.sequence.prompt_len:
            last = row + piece.end - piece.start - 1
            reading.embedding = embed(head.final(hidden[last : last + 1])[0])
        row += len(piece.tokens)


def embed(hidden: Array) -> bytes:
    """A row [D] as a vector of length 1, float32 and little-endian."""
    return (hidden / np.linalg.norm(hidden)).astype("<f4").tobytes()


def score(
    hidden: Array,
    logits: Callable[[Array], Array],
    targets: list[int],
    top: int,
) -> list[Sampled]:
    """Logprob of each target [n] after its row of hidden [n, D], and the `top` likeliest.

    `logits` makes [n, V] of [n, D].
    """
    scores: list[Sampled] = []
    for first in range(0, len(targets), ROWS):
        rows = _log_softmax(logits(hidden[first : first + ROWS]))
        for target, row in zip(targets[first : first + ROWS], rows, strict=True):
            likeliest = tuple((int(token), float(row[token])) for token in largest(row, top))
            scores.append(Sampled(target, float(row[target]), likeliest))
    return scores


def _log_softmax(logits: Array) -> Array:
    """[n, V] -> [n, V], where each row's exponentials sum to 1."""
    shifted: Array = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
