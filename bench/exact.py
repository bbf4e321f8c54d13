"""Do the native engine's greedy tokens equal transformers' in `exact` mode?

    python bench/exact.py [--json] [--threads N]

Prints one line per prompt: how many of its 64 tokens are equal, alone, in a batch of 16 and with
its prompt computed in small chunks, and the oracle's smallest gap between its top two logits. Exits
with 1 if tokens part anywhere but at a near tie (a gap below 1e-3).
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import msgspec
from oracle import MODEL, NEW_TOKENS, Case, load_cases

from scheduler.batching import Batcher, Sequence
from scheduler.blocks import BlockPool
from scheduler.request import Job, Limits, Prompt, Sampling
from workers.native import NativeRunner
from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from scheduler.request import TokenIds
    from workers.runner import Runner

KV_BLOCKS = 1024
# name → (most sequences at once, tokens a step)
MODES = {"alone": (1, 4096), "batch 16": (16, 512), "chunks of 33": (4, 33)}


class Verdict(msgspec.Struct, frozen=True):
    """How far one prompt's tokens agree with the oracle's."""

    prompt_tokens: int
    mode: str
    equal: int
    smallest_gap: float
    holds: bool  # all are equal, or the first that is not is a near tie


def complete(
    runner: Runner,
    prompts: list[TokenIds],
    *,
    max_sequences: int,
    max_step_tokens: int,
    new_tokens: int = NEW_TOKENS,
    sampling: Sampling | None = None,
) -> list[TokenIds]:
    """Run all prompts to their end through the batcher; gives what each one emitted."""
    pool = BlockPool(runner.cache.blocks)
    batcher = Batcher(pool, max_step_tokens=max_step_tokens, max_sequences=max_sequences)
    sequences = [
        Sequence(
            job=Job(
                id=str(i),
                epoch=0,
                model="",
                prompt=Prompt(ids=prompt),
                sampling=sampling or Sampling(seed=0, temperature=0.0),
                limits=Limits(),
                created=0.0,
            ),
            choice=0,
            tokens=list(prompt),
            prompt_len=len(prompt),
            max_tokens=new_tokens,
        )
        for i, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        batcher.add(sequence)
    while batcher.has_work:
        step = batcher.next_step()
        drawing = [piece.sequence for piece in step.slices if piece.choices]
        sampled = runner.run(step.slices)
        batcher.advance(step)
        for sequence, drawn in zip(drawing, sampled, strict=True):
            sequence.tokens.append(drawn.token)
            if sequence.position == sequence.max_tokens:
                batcher.remove(sequence)
    batcher.check_integrity()
    return [sequence.tokens[sequence.prompt_len :] for sequence in sequences]


def compare(runner: Runner, cases: list[Case], mode: str) -> list[Verdict]:
    """Run the cases in one of MODES."""
    max_sequences, max_step_tokens = MODES[mode]
    emitted = complete(
        runner,
        [case.prompt for case in cases],
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
    )
    return [compare_tokens(case, mode, ours) for case, ours in zip(cases, emitted, strict=True)]


def compare_tokens(case: Case, mode: str, ours: TokenIds) -> Verdict:
    """Equal up to where they part for the first time: what follows answers another prompt."""
    pairs = enumerate(zip(ours, case.tokens, strict=True))
    equal = next((i for i, (mine, theirs) in pairs if mine != theirs), len(ours))
    return Verdict(
        prompt_tokens=len(case.prompt),
        mode=mode,
        equal=equal,
        smallest_gap=case.smallest_gap,
        holds=equal == len(ours) or equal in case.near_ties,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    cases = load_cases()
    runner = NativeRunner(open_checkpoint(resolve(MODEL).path), KV_BLOCKS, args.threads)
    by_mode = {mode: compare(runner, cases, mode) for mode in MODES}
    if args.json:
        for verdicts in by_mode.values():
            for verdict in verdicts:
                print(msgspec.json.encode(verdict).decode())
    else:
        print_table(by_mode)
    return 0 if all(v.holds for verdicts in by_mode.values() for v in verdicts) else 1


def print_table(by_mode: dict[str, list[Verdict]]) -> None:
    print(f"{'prompt':>7}" + "".join(f"{mode:>14}" for mode in by_mode) + f"{'smallest gap':>14}")
    for row in zip(*by_mode.values(), strict=True):
        counts = "".join(f"{f'{v.equal}/{NEW_TOKENS}':>14}" for v in row)
        print(f"{row[0].prompt_tokens:>7}{counts}{row[0].smallest_gap:>14.6f}")


if __name__ == "__main__":
    sys.exit(main())
