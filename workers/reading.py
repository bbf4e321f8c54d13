"""What is read off a prompt's rows beside the token that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workers.runner import Sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from scheduler import batching
    from scheduler.batching import Slice
    from workers.runner import Reading

ROWS = 16  # logits of so many rows exist at a time: 16 × 128,000 × 4 bytes = 8 MB


def read(
    slices: Iterable[Slice],
    hidden: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    readings: Mapping[batching.Sequence, Reading],
) -> None:
    """Fill `readings` with the scores of their prompts' tokens.

    hidden [T, D] holds the slices' rows one after another; `logits` makes [n, V] of [n, D].
    """
    row = 0
    for piece in slices:
        if reading := readings.get(piece.sequence):
            # The row of position p says what comes at p + 1.
            end = min(piece.end + 1, piece.sequence.prompt_len)
            targets = piece.sequence.tokens[piece.start + 1 : end]
            rows = hidden[row : row + len(targets)]
            reading.take(piece.start, score(rows, logits, targets, reading.top))
        row += len(piece.tokens)


@torch.inference_mode()
def score(
    hidden: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    targets: list[int],
    top: int,
) -> list[Sampled]:
    """Logprob of each target [n] after its row of hidden [n, D], and the `top` likeliest."""
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
