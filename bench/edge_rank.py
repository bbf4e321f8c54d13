"""Rank 0 of one arm of bench/edge.py, in a process of its own: prints what it measured as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from scheduler.batching import Sequence, Slice
from scheduler.blocks import blocks_for
from scheduler.request import Job, Limits, Prompt, Sampling
from workers.group.leader import Leader
from workers.group.part import FastPart, Means
from workers.group.runner import GroupOptions, GroupRunner
from workers.group.shard_folder import ShardFolder

WAIT_S = 3600.0  # for the other ranks to have written tens of GB


def main() -> None:
    setup = json.loads(sys.argv[1])
    secret = setup["secret"].encode()
    leader = Leader("127.0.0.1", setup["port"], secret, setup["name"])
    leader.wait_for(setup["ranks"] - 1, WAIT_S)
    context = setup["prompt_tokens"] + setup["new_tokens"] + 1
    blocks = max(1, setup["batch"]) * blocks_for(context)
    runner = GroupRunner(
        leader,
        GroupOptions(
            mode=setup["mode"],
            quantize=None,
            kv_dtype="float16",
            path=setup["path"],
            kv_blocks=blocks,
            max_rows=max(setup["chunk"], setup["batch"]),
            means=Means(
                setup["threads"],
                # The arms keep each other's shards.
                ShardFolder(Path(setup["shards"]), f"{setup['name']} of {setup['ranks']}"),
                setup["cap"],
                direct=setup["direct"],
            ),
            weight=1.0,
            box=None,
            listen_host="127.0.0.1",
            secret=secret,
            way=setup["way"],
        ),
    )
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()  # the disk is measured meanwhile, alone
    print(json.dumps(measure(runner, setup)), flush=True)
    sys.stdin.readline()  # until the other ranks' memory was read
    runner.close()


def measure(runner: GroupRunner, setup: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a prompt, of each token after it, and of a step of a batch."""
    sequence = new_sequence(setup["prompt_tokens"], 0, setup["vocab"])
    prompt_s = prefill(runner, sequence, setup["chunk"])
    steps = [timed_step(runner, [sequence]) for _ in range(setup["new_tokens"])]
    before = streamed(runner)
    timed_step(runner, [sequence])
    per_step = streamed(runner) - before
    tokens = list(sequence.tokens)
    batch_s = []
    if setup["batch"]:
        many = [new_sequence(1, number, setup["vocab"]) for number in range(setup["batch"])]
        batch_s = [timed_step(runner, many) for _ in range(setup["batch_steps"])]
    part = runner.part
    shard = part.shard if isinstance(part, FastPart) else None
    return {
        "prompt_s": prompt_s,
        "step_s": steps,
        "batch_s": batch_s,
        "tokens": tokens,
        "read_per_step": per_step,
        "streamed": shard.streamed_bytes if shard else 0,
        "weights": shard.total_bytes if shard else 0,
    }


def new_sequence(tokens: int, number: int, vocab: int) -> Sequence:
    ids = [(7919 * index + 104_729 * number) % vocab for index in range(tokens)]
    job = Job(
        id=str(number),
        epoch=0,
        model="",
        prompt=Prompt(ids=ids),
        sampling=Sampling(seed=0, temperature=0.0),
        limits=Limits(),
        created=0.0,
    )
    return Sequence(job, 0, ids, tokens, 1 << 20)


def prefill(runner: GroupRunner, sequence: Sequence, chunk: int) -> float:
    """In chunks, as the batcher cuts prompts; the first token is appended."""
    sequence.blocks = list(range(runner.cache.blocks))
    begun, total = time.perf_counter(), len(sequence.tokens)
    for start in range(0, total, chunk):
        drawn = runner.run([Slice(sequence, start, min(total, start + chunk))])
    sequence.tokens.append(drawn[0].token)
    return time.perf_counter() - begun


def timed_step(runner: GroupRunner, sequences: list[Sequence]) -> float:
    """One token of each sequence; those without blocks get their own."""
    each = runner.cache.blocks // len(sequences)
    for number, sequence in enumerate(sequences):
        if not sequence.blocks:
            sequence.blocks = list(range(number * each, (number + 1) * each))
    begun = time.perf_counter()
    slices = [Slice(s, len(s.tokens) - 1, len(s.tokens)) for s in sequences]
    for sequence, sampled in zip(sequences, runner.run(slices), strict=True):
        sequence.tokens.append(sampled.token)
    return time.perf_counter() - begun


def streamed(runner: GroupRunner) -> int:
    """Bytes that this rank has read for steps so far."""
    part = runner.part
    return part.shard.bytes_read if isinstance(part, FastPart) and part.shard else 0


if __name__ == "__main__":
    main()
