"""What packing a KV cache for a slow link saves, costs and loses.

    python bench/kv_codec.py [--tiny] [--json] [--windows N] [--threads N]

SmolLM2-135M reads windows of bench/prose.txt in exact mode. The KV of each window's first 384
tokens is packed and unpacked, and the model goes on over the next 128 tokens of the text with what
came out: agreement is the share of positions whose likeliest next token is the one without packing.
Sizes are beside float32. Rates are of float32 values per second of CPU time, on one core.

Exits with 1 if a figure misses its goal.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import starmap
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from scheduler.messages import KvBlocks
from scheduler.request import Prompt
from workers.build import find
from workers.kv_cache import KvCache
from workers.kv_pack import pack, unpack
from workers.model import Batch, Model, Prefill
from workers.text import Text
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    Array = np.ndarray[Any, Any]

MODEL = "smollm2-135m-instruct"
READ, GO_ON = 384, 128
GOALS = {"int8": (3.7, 0.99), "int4": (7.0, 0.95)}
LEAST_RATE = 300.0


class Result(msgspec.Struct, frozen=True):
    """Of one codec."""

    codec: str
    times_smaller: float
    agreement: float
    positions: int
    encode_mb_s: float
    decode_mb_s: float

    @property
    def holds(self) -> bool:
        smaller, agreement = GOALS[self.codec]
        fast = min(self.encode_mb_s, self.decode_mb_s) >= LEAST_RATE
        return self.times_smaller >= smaller and self.agreement >= agreement and fast


class Reader:
    """The model, with a cache for one window."""

    def __init__(self, read: int, go_on: int) -> None:
        checkpoint = open_checkpoint(Path(find(MODEL).location))
        self.text = Text.from_checkpoint(checkpoint)
        self.model = Model(checkpoint)
        self.read = read
        self._table = torch.arange((read + go_on) // 16)
        self.cache = KvCache(checkpoint.shape, len(self._table))
        planes, tokens = 2 * self.cache.layers, read + go_on
        self.kv = self.cache.data.reshape(planes, tokens, -1)  # blocks are in order
        self.said = KvBlocks(
            id="",
            epoch=0,
            first_layer=0,
            layers=self.cache.layers,
            tokens=read,
            kv_heads=self.cache.kv_heads,
            head_dim=self.cache.head_dim,
            dtype="float32",
            codec="raw",
        )

    def likeliest(self, tokens: list[int], start: int) -> Array:
        """The likeliest token after each of these, which begin at position `start`."""
        place = torch.arange(start, start + len(tokens))
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=place,
            slots=place,
            prefills=(Prefill(0, len(tokens), start, self._table),),
            decodes=(),
            drawn=torch.arange(len(tokens)),
        )
        return self.model.forward(batch, torch.from_numpy(self.cache.data)).argmax(1).numpy()


def windows(tokens: list[int], read: int, go_on: int, count: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens) - read - go_on + 1, read + go_on)[:count]:
        yield tokens[start : start + read + go_on]


def measure(reader: Reader, tokens: list[list[int]], codecs: list[str]) -> list[Result]:
    found: dict[str, list[tuple[float, float, float, float]]] = {codec: [] for codec in codecs}
    count = 0
    for window in tokens:
        reader.likeliest(window[: reader.read], 0)
        kv, rest = reader.kv[:, : reader.read].copy(), window[reader.read :]
        right = reader.likeliest(rest, reader.read)
        count += len(rest)
        for codec in codecs:
            *cost, values = through(codec, kv, reader.said)
            reader.kv[:, : reader.read] = values
            agreement = float((reader.likeliest(rest, reader.read) == right).mean())
            found[codec].append((cost[0], agreement, cost[1], cost[2]))

    def summary(codec: str, rows: list[tuple[float, float, float, float]]) -> Result:
        smaller, agreement, encode, decode = zip(*rows, strict=True)
        mean = sum(agreement) / len(agreement)
        return Result(codec, median(smaller), mean, count, median(encode), median(decode))

    return list(starmap(summary, found.items()))


def through(codec: str, kv: Array, said: KvBlocks) -> tuple[float, float, float, Array]:
    """(times smaller, MB/s packed, MB/s unpacked, what comes out) of one window's KV."""
    said = msgspec.structs.replace(said, codec=codec)
    raw = np.ascontiguousarray(kv).view(np.uint8).ravel()
    begun = time.thread_time()
    packed = pack(codec, raw, said)
    between = time.thread_time()
    values = unpack(packed, said)
    ended = time.thread_time()
    size = kv.nbytes / 1e6
    return kv.nbytes / packed.nbytes, size / (between - begun), size / (ended - between), values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--tiny", action="store_true", help="little and quick: does it still run?")
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    read, go_on, count = (64, 16, 1) if args.tiny else (READ, GO_ON, args.windows)
    reader = Reader(read, go_on)
    prose = Prompt(text=(Path(__file__).parent / "prose.txt").read_text())
    tokens = list(windows(reader.text.encode(prose, 0.0), read, go_on, count))
    results = measure(reader, tokens, list(GOALS))
    for result in results:
        if args.json:
            print(msgspec.json.encode(result).decode())
            continue
        print(
            f"{result.codec}: {result.times_smaller:.2f} times smaller, agreement "
            f"{result.agreement:.2%} of {result.positions}, {result.encode_mb_s:.0f} MB/s packed, "
            f"{result.decode_mb_s:.0f} unpacked{'' if result.holds else '  BELOW'}"
        )
    return 0 if args.tiny or all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
