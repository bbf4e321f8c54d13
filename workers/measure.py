"""What this worker can do, measured before it joins: the numbers that routing starts from."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scheduler.batching import Sequence, Slice
from scheduler.blocks import blocks_for
from scheduler.messages import Rates
from scheduler.models import BLOCK_TOKENS
from scheduler.request import Job, Limits, Prompt, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workers.runner import Runner

PROMPT_TOKENS = 128
RUNS = 5
# Under a CPU quota work is quick until that is used up, and then stands still: what it takes in the
# long run is seen over several of the quota's periods, which are 0.1 s at the most.
LONG_ENOUGH_S = 0.3
BUDGET_S = 0.8  # no further run begins after this; the first always ends


def measure(runner: Runner, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Time a prompt and a lone decode on an idle runner, whose cache is left as it was found."""
    prompt = min(PROMPT_TOKENS, runner.cache.blocks * BLOCK_TOKENS - 1)
    with borrowed(runner, prompt) as sequence:
        prefill = _seconds(runner, Slice(sequence, 0, prompt), clock)
        sequence.tokens.append(0)
        decode = _seconds(runner, Slice(sequence, prompt, prompt + 1), clock)
    return Rates(prefill_tokens_per_s=prompt / prefill, decode_s_per_token=decode)


@contextmanager
def borrowed(runner: Runner, prompt: int) -> Iterator[Sequence]:
    """A sequence of so many tokens in the first blocks of an idle cache, which get back theirs."""
    tokens = [number % runner.vocab for number in range(prompt)]  # alike, all meet few experts
    sequence = greedy_sequence(tokens, list(range(blocks_for(prompt + 1))), max_tokens=2)
    used = runner.cache.data[:, :, : len(sequence.blocks)]
    found = used.copy()
    try:
        yield sequence
    finally:
        used[...] = found


def greedy_sequence(tokens: list[int], blocks: list[int], max_tokens: int) -> Sequence:
    """A prompt that no client asked for, in these blocks of the cache."""
    job = Job(
        id="measure",
        epoch=0,
        model="",
        prompt=Prompt(ids=tokens),
        sampling=Sampling(seed=0, temperature=0.0),
        limits=Limits(),
        created=0.0,
    )
    return Sequence(
        job=job,
        choice=0,
        tokens=list(tokens),
        prompt_len=len(tokens),
        max_tokens=max_tokens,
        blocks=blocks,
    )


def _seconds(runner: Runner, piece: Slice, clock: Callable[[], float]) -> float:
    """Time of a slice, on the mean over runs in a row."""
    runner.run([piece])  # pages are touched and code is warm
    runs, begun = 0, clock()
    while True:
        runner.run([piece])
        runs += 1
        took = clock() - begun
        if took >= BUDGET_S or (runs >= RUNS and took >= LONG_ENOUGH_S):
            return took / runs
