"""What this worker can do, measured before it joins: the numbers that routing starts from."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

from scheduler.batching import Sequence, Slice
from scheduler.blocks import blocks_for
from scheduler.messages import Rates
from scheduler.models import BLOCK_TOKENS
from scheduler.request import Job, Limits, Prompt, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.runner import Runner

PROMPT_TOKENS = 128
RUNS = 5
PREFILL_BUDGET_S = 0.8  # no further run begins after this; the first always ends
DECODE_BUDGET_S = 0.5


def measure(runner: Runner, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Time a prompt and a lone decode on an idle runner, whose cache is left as it was found."""
    prompt = min(PROMPT_TOKENS, runner.cache.blocks * BLOCK_TOKENS - 1)
    tokens = [number % runner.vocab for number in range(prompt)]  # alike, all meet few experts
    sequence = greedy_sequence(tokens, list(range(blocks_for(prompt + 1))), max_tokens=2)
    used = runner.cache.data[:, :, : len(sequence.blocks)]
    found = used.copy()
    try:
        runner.run([Slice(sequence, 0, prompt)])  # pages are touched and code is warm
        prefill = _seconds(runner, Slice(sequence, 0, prompt), PREFILL_BUDGET_S, clock)
        sequence.tokens.append(0)
        decode = _seconds(runner, Slice(sequence, prompt, prompt + 1), DECODE_BUDGET_S, clock)
    finally:
        used[...] = found
    return Rates(prefill_tokens_per_s=prompt / prefill, decode_s_per_token=decode)


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


def _seconds(runner: Runner, piece: Slice, budget: float, clock: Callable[[], float]) -> float:
    """Median time of a slice, over as many runs as fit."""
    times: list[float] = []
    while len(times) < RUNS and sum(times) < budget:
        begun = clock()
        runner.run([piece])
        times.append(clock() - begun)
    return median(times)
