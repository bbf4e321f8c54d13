"""Speed of a mixture of experts in `fast` mode beside `exact`.

    python bench/experts.py [--json] [--threads N] [--rounds N]

A model of Qwen3-MoE's form with random Q4_1 weights (24 layers, D 512, 32 experts of F 256, 4 of
them used): prompts of 512 random tokens, then 32 greedy tokens behind them, alone and 8 sequences
at a time. The two modes take turns on the same prompts; figures are medians over the rounds, of
CPU time where there is one thread, as other processes do not count then.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import gguf
import msgspec
import numpy as np
from gguf import GGMLQuantizationType as Kind

from scheduler.batching import Slice
from scheduler.blocks import blocks_for
from workers.fast import FastRunner
from workers.measure import greedy_sequence
from workers.native import NativeRunner
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.batching import Sequence
    from workers.runner import Runner

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 24, 512, 8, 4, 64, 4096
EXPERTS, USED, FFN = 32, 4, 256
PROMPT, NEW_TOKENS, TOGETHER = 512, 32, 8
BLOCKS = TOGETHER * blocks_for(PROMPT + NEW_TOKENS)


class Speed(msgspec.Struct, frozen=True):
    """Tokens per second, medians."""

    mode: str
    prefill: float
    decode: float
    decode_together: float  # of all sequences


def write_model(path: Path) -> None:
    """Weights uniform in ±0.035 (norms are 1), and a vocabulary without meaning."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_expert_feed_forward_length(FFN)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(number) for number in range(VOCAB)])
    rng = np.random.default_rng(0)
    for name, dims in _tensors().items():
        if len(dims) == 1:
            writer.add_tensor(name, np.ones(dims, np.float32))
        elif name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, rng.normal(0, 0.1, dims).astype(np.float32))
        else:
            blocks = rng.integers(0, 256, (*dims[:-1], dims[-1] // 32, 20), np.uint8)
            blocks[..., :4] = np.array([0.07 / 15, -0.035], "<f2").view(np.uint8)
            data = blocks.reshape(*dims[:-1], -1)
            writer.add_tensor(name, data, raw_dtype=Kind.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors() -> dict[str, tuple[int, ...]]:
    """GGUF's name → dimensions, rows first."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (queries, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_q_norm": (HEAD_DIM,),
        "attn_k_norm": (HEAD_DIM,),
        "attn_output": (HIDDEN, queries),
        "ffn_norm": (HIDDEN,),
        "ffn_gate_inp": (EXPERTS, HIDDEN),
        "ffn_gate_exps": (EXPERTS, FFN, HIDDEN),
        "ffn_up_exps": (EXPERTS, FFN, HIDDEN),
        "ffn_down_exps": (EXPERTS, HIDDEN, FFN),
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    for number in range(LAYERS):
        tensors |= {f"blk.{number}.{name}.weight": dims for name, dims in layer.items()}
    return tensors | {"output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def prompt(seed: int, number: int) -> Sequence:
    """A sequence of random tokens in blocks of its own."""
    tokens = random.Random(seed).choices(range(VOCAB), k=PROMPT)
    each = blocks_for(PROMPT + NEW_TOKENS)
    blocks = list(range(number * each, (number + 1) * each))
    return greedy_sequence(tokens, blocks, NEW_TOKENS + 1)


def round_of(runner: Runner, seed: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds of a prompt, of a lone sequence's tokens, and of several sequences' tokens."""
    sequences = [prompt(seed + number, number) for number in range(TOGETHER)]
    begun = clock()
    sequences[0].tokens.append(runner.run([Slice(sequences[0], 0, PROMPT)])[0].token)
    prefill = clock() - begun
    for sequence in sequences[1:]:
        sequence.tokens.append(runner.run([Slice(sequence, 0, PROMPT)])[0].token)
    return prefill, _decode(runner, sequences[:1], clock), _decode(runner, sequences, clock)


def _decode(runner: Runner, sequences: list[Sequence], clock: Callable[[], float]) -> float:
    for sequence in sequences:
        del sequence.tokens[PROMPT + 1 :]
    begun = clock()
    for _ in range(NEW_TOKENS - 1):
        ends = [len(sequence.tokens) for sequence in sequences]
        slices = [Slice(s, end - 1, end) for s, end in zip(sequences, ends, strict=True)]
        for sequence, sampled in zip(sequences, runner.run(slices), strict=True):
            sequence.tokens.append(sampled.token)
    return clock() - begun


def compare(threads: int, rounds: int) -> list[Speed]:
    clock = time.process_time if threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.gguf"
        write_model(path)
        checkpoint = open_checkpoint(path)
        runners: dict[str, Runner] = {
            "fast": FastRunner(checkpoint, BLOCKS, threads, PROMPT),
            "exact": NativeRunner(checkpoint, BLOCKS, threads),
        }
        checkpoint.close()
    times: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in runners}
    for number in range(1 + rounds):  # the first does not count: pages are touched
        for mode, runner in runners.items():
            times[mode].append(round_of(runner, 100 * number, clock))
    speeds = []
    for mode, found in times.items():
        prefill, decode, together = (median(column) for column in zip(*found[1:], strict=True))
        steps = NEW_TOKENS - 1
        speeds.append(Speed(mode, PROMPT / prefill, steps / decode, TOGETHER * steps / together))
    return speeds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    speeds = compare(options.threads, options.rounds)
    if options.json:
        print(msgspec.json.encode(speeds).decode())
        return 0
    print(f"tokens/s  {'prefill':>9} {'decode':>9} {f'decode of {TOGETHER}':>12}")
    for speed in speeds:
        print(
            f"{speed.mode:9} {speed.prefill:9.0f} {speed.decode:9.1f} {speed.decode_together:12.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
