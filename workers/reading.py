"""What is read off a prompt's rows beside the token that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from workers.runner import Sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from scheduler import batching
    from scheduler.batching import Slice
    from workers.runner import Reading

ROWS = 16  # logits of so many rows exist at a time: 16 × 128,000 × 4 bytes = 8 MB


class Head(Protocol):
    """The end of a model, after its last layer."""

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised as the vocabulary's matrix reads it: [n, D] -> [n, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, V], for at most ROWS rows."""
        ...


def read(
    slices: Iterable[Slice],
    hidden: torch.Tensor,
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


@torch.inference_mode()
def embed(hidden: torch.Tensor) -> bytes:
    """A row [D] as a vector of length 1, float32 and little-endian."""
    vector = torch.nn.functional.normalize(hidden.float(), dim=-1)
    return vector.numpy().astype("<f4").tobytes()


@torch.inference_mode()
def score(
    hidden: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    targets: list[int],
    top: int,
) -> list[Sampled]:
    """Logprob of each target [n] after its row of hidden [n, D], and the `top` likeliest.

    `logits` makes [n, V] of [n, D].
    """
    scores: list[Sampled] = []
    for first in range(0, len(targets), ROWS):
        ids = torch.tensor(targets[first : first + ROWS]).unsqueeze(1)
        logprobs = logits(hidden[first : first + ROWS]).log_softmax(-1)
        own = logprobs.gather(1, ids).squeeze(1).tolist()
        best, tokens = logprobs.topk(min(top, logprobs.shape[1]))
        likeliest = zip(tokens.tolist(), best.tolist(), strict=True)
        scores += [
            Sampled(target, logprob, tuple(zip(ids_, logprobs_, strict=True)))
            for target, logprob, (ids_, logprobs_) in zip(
                targets[first : first + ROWS], own, likeliest, strict=True
            )
        ]
    return scores
