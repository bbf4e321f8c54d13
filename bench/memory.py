"""Peak memory of a worker that serves, in `fast` mode, and what it is made of.

    python bench/memory.py [--json] [--kv-tokens N] [--kv-dtype float16|int8] [--model MODEL]

Starts `motley serve` with one mixed worker, fills its KV cache with prompts, has one prompt scored
(echo with logprobs), and reads the worker's VmHWM. Exits with 1 if that is more than a process that
imports torch, the weight file, the KV bytes and 60 MB together.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from pathlib import Path

import aiohttp
import msgspec
from engine_machine import bare_torch_rss
from engine_process import peak_rss
from latency_http import serving

from workers.kv_cache import KvCache
from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

MODEL = "smollm2-135m-instruct"
SPARE = 60 * 10**6
PROMPT, NEW_TOKENS = 1000, 16
SCORED = 500
SILENCE_S = 120


class Report(msgspec.Struct, frozen=True):
    """Bytes."""

    peak: int
    bare_torch: int
    weight_file: int
    kv_cache: int

    @property
    def limit(self) -> int:
        return self.bare_torch + self.weight_file + self.kv_cache + SPARE


def measure(model: str, kv_tokens: int, kv_dtype: str) -> Report:
    source = resolve(model)
    checkpoint = open_checkpoint(source.path)
    cache = KvCache(checkpoint.shape, kv_tokens // 16, kv_dtype)
    checkpoint.close()
    words = ("--kv-tokens", str(kv_tokens), "--kv-dtype", kv_dtype, "--threads", "1")
    return Report(
        peak=asyncio.run(served_peak(model, source.name, words, kv_tokens // PROMPT)),
        bare_torch=bare_torch_rss(),
        weight_file=source.path.stat().st_size,
        kv_cache=cache.data.nbytes,
    )


async def served_peak(model: str, name: str, words: tuple[str, ...], prompts: int) -> int:
    """The worker's peak after so many prompts at once, and one that is scored."""
    draw = random.Random(0)
    bodies: list[dict[str, object]] = [
        {"prompt": draw.choices(range(100, 40_000), k=PROMPT), "max_tokens": NEW_TOKENS}
        for _ in range(prompts)
    ]
    scored = {"prompt": draw.choices(range(100, 40_000), k=SCORED), "max_tokens": 1}
    timeout = aiohttp.ClientTimeout(sock_read=SILENCE_S)
    async with (
        serving(model, words) as (url, router),
        aiohttp.ClientSession(timeout=timeout) as session,
    ):

        async def complete(body: dict[str, object]) -> None:
            whole = {"model": name, "ignore_eos": True, **body}
            async with session.post(f"{url}/v1/completions", json=whole) as reply:
                reply.raise_for_status()
                await reply.read()

        await asyncio.gather(*map(complete, bodies))
        await complete({**scored, "echo": True, "logprobs": 5})
        return peak_rss(child_of(router))


def child_of(process: int) -> int:
    """Its one child process."""
    (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--kv-tokens", type=int, default=8192)
    parser.add_argument("--kv-dtype", choices=["float16", "int8"], default="float16")
    parser.add_argument("--model", default=MODEL)
    args = parser.parse_args()
    report = measure(args.model, args.kv_tokens, args.kv_dtype)
    if args.json:
        print(msgspec.json.encode(report).decode())
    else:
        parts = {**msgspec.structs.asdict(report), "spare": SPARE, "limit": report.limit}
        for part, size in parts.items():
            print(f"{part:12}{size / 1e6:8.1f} MB")
    return 0 if report.peak <= report.limit else 1


if __name__ == "__main__":
    sys.exit(main())
