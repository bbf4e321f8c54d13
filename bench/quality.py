"""How much of the model's quality does `fast` mode cost?

    python bench/quality.py [--json] [--threads N] [--model MODEL]

Prints top-1 agreement, mean and largest KL divergence and perplexities over the positions of
bench/prose.txt, against the same quantised weights in fp32: for `fast` as it runs, with its fp16 KV
cache and with an int8 one; for int8 activations alone (with an fp32 KV cache), and for an fp16 and
an int8 KV cache alone. Exits with 1 if `fast` agrees in less than 98 % of the positions, or
diverges by more than 0.01 nats on average; the int8 cache is a choice, whose price is only printed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from kernels.program import Pool, Span
from kernels.reference_quant import kv_rounded
from scheduler.blocks import blocks_for
from scheduler.models import BLOCK_TOKENS
from workers.fast_model import FastModel
from workers.kv_cache import KvCache
from workers.model import Batch, Model, Prefill
from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scheduler.models import ModelShape
    from scheduler.request import TokenIds
    from workers.weights.checkpoint import Checkpoint

    Rounding = Callable[[torch.Tensor], torch.Tensor]  # keys and values [..., E]

PROSE = Path(__file__).with_name("prose.txt")
CONTEXT = 1024  # tokens of a window; each starts from nothing
CHUNK = 256  # rows whose logits are made at a time
ROUNDED_STEP = 8  # tokens between two roundings of the exact model's cache
LEAST_AGREEMENT, MOST_KL = 0.98, 0.01


class Verdict(msgspec.Struct, frozen=True):
    """One variant beside the reference; nats."""

    variant: str
    positions: int
    agreement: float  # share of positions with the same likeliest token
    mean_kl: float  # KL(reference ‖ variant)
    largest_kl: float
    perplexity: float  # of the text's own next tokens
    reference_perplexity: float

    @property
    def holds(self) -> bool:
        return self.agreement >= LEAST_AGREEMENT and self.mean_kl <= MOST_KL


@dataclass
class Tally:
    """Sums over positions."""

    equal: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    surprise: list[torch.Tensor] = field(default_factory=list)
    reference_surprise: list[torch.Tensor] = field(default_factory=list)

    def add(self, reference: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits [T, V] of both, and the tokens [n] that follow the first n ≤ T rows."""
        truth, guess = reference.log_softmax(-1), ours.log_softmax(-1)
        self.equal.append(truth.argmax(-1) == guess.argmax(-1))
        self.kl.append((truth.exp() * (truth - guess)).sum(-1))
        rows = torch.arange(len(targets))
        self.surprise.append(-guess[rows, targets])
        self.reference_surprise.append(-truth[rows, targets])

    def verdict(self, variant: str) -> Verdict:
        kl = torch.cat(self.kl).double()
        return Verdict(
            variant=variant,
            positions=len(kl),
            agreement=torch.cat(self.equal).double().mean().item(),
            mean_kl=kl.mean().item(),
            largest_kl=kl.max().item(),
            perplexity=math.exp(torch.cat(self.surprise).double().mean().item()),
            reference_perplexity=math.exp(
                torch.cat(self.reference_surprise).double().mean().item()
            ),
        )


class Exact:
    """The exact model, which is checked against transformers elsewhere."""

    def __init__(self, checkpoint: Checkpoint, step: int, rounded: Rounding) -> None:
        """Prompts are cut into pieces of `step` tokens, after each of which the cache is rounded.

        So a token sees what is older than its own piece as `rounded` leaves it.
        """
        self._model, self._step, self._rounded = Model(checkpoint), step, rounded
        self._cache = torch.from_numpy(_cache(checkpoint.shape, "float32").data)

    def logits(self, ids: TokenIds) -> Iterator[torch.Tensor]:
        """[T, V] in pieces of CHUNK rows."""
        rows = torch.arange(len(ids))
        pieces: list[torch.Tensor] = []
        for piece in torch.split(rows, self._step):
            start, end = int(piece[0]), int(piece[-1]) + 1
            prefill = Prefill(0, len(piece), start, torch.arange(blocks_for(end)))
            batch = Batch(torch.tensor(ids[start:end]), piece, piece, (prefill,), (), piece)
            pieces.append(self._model.hidden(batch, self._cache))
            places = [place % BLOCK_TOKENS for place in range(start, end)]
            blocks = [place // BLOCK_TOKENS for place in range(start, end)]
            self._cache[:, :, blocks, places] = self._rounded(self._cache[:, :, blocks, places])
        for chunk in torch.split(torch.cat(pieces), CHUNK):
            yield self._model.logits(chunk)


class Fast:
    """The kernels, prompts cut into pieces of CHUNK tokens."""

    def __init__(self, checkpoint: Checkpoint, threads: int, kv_dtype: str) -> None:
        cache = _cache(checkpoint.shape, kv_dtype)
        self._model = FastModel(checkpoint, cache, Pool(threads), CHUNK)

    def logits(self, ids: TokenIds) -> Iterator[torch.Tensor]:
        """[T, V] in pieces of CHUNK rows, each valid until the next."""
        for first in range(0, len(ids), CHUNK):
            piece = ids[first : first + CHUNK]
            blocks = range(blocks_for(first + len(piece)))
            span = Span(0, len(piece), first, blocks)
            self._model.program.run(piece, [span], range(len(piece)))
            yield torch.from_numpy(self._model.drawn_logits.data[: len(piece)])


def _cache(shape: ModelShape, dtype: str) -> KvCache:
    return KvCache(shape, blocks_for(CONTEXT), dtype)


@torch.inference_mode()
def compare(model: str, threads: int) -> list[Verdict]:
    """`fast` with either cache, then what it does to activations, and to the cache, alone."""
    checkpoint = open_checkpoint(resolve(model).path)
    ids = checkpoint.tokenizer().encode(prose(), add_special_tokens=False).ids
    reference = Exact(checkpoint, CONTEXT, lambda kv: kv)
    variants: dict[str, Exact | Fast] = {
        "fast": Fast(checkpoint, threads, "float16"),
        "fast, int8 KV": Fast(checkpoint, threads, "int8"),
        "int8 activations": Fast(checkpoint, threads, "float32"),
        "fp16 KV": Exact(checkpoint, ROUNDED_STEP, lambda kv: kv.half().float()),
        "int8 KV": Exact(checkpoint, ROUNDED_STEP, kv_rounded),
    }
    tallies = {name: Tally() for name in variants}
    for start in range(0, len(ids), CONTEXT):
        window = ids[start : start + CONTEXT]
        truths = list(reference.logits(window))
        for name, variant in variants.items():
            for chunk, (truth, ours) in enumerate(zip(truths, variant.logits(window), strict=True)):
                targets = window[chunk * CHUNK + 1 : (chunk + 1) * CHUNK + 1]
                tallies[name].add(truth, ours, torch.tensor(targets))
    return [tally.verdict(name) for name, tally in tallies.items()]


def prose() -> str:
    """The text, without the line that says whose it is."""
    return PROSE.read_text().partition("\n\n")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    verdicts = compare(args.model, args.threads)
    if args.json:
        for verdict in verdicts:
            print(msgspec.json.encode(verdict).decode())
    else:
        print_table(verdicts)
    return 0 if verdicts[0].holds else 1


def print_table(verdicts: list[Verdict]) -> None:
    print(f"{verdicts[0].positions} positions, windows of {CONTEXT} tokens")
    print(
        f"{'':>18}{'top-1 equal':>13}{'mean KL':>10}{'largest KL':>12}{'perplexity':>12}{'fp32':>9}"
    )
    for v in verdicts:
        print(
            f"{v.variant:>18}{v.agreement:>12.2%}{v.mean_kl:>11.1e}{v.largest_kl:>12.1e}"
            f"{v.perplexity:>12.3f}{v.reference_perplexity:>9.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
