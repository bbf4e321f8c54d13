"""How fast a KV cache gets from one worker to another, and how much of that hides behind prefill.

    python bench/kv_transfer.py [--tiny] [--json] [--only rates,ttft,hidden,packed] [--threads N]

- rates: KV of SmolLM2-135M in float16, one stream, over loopback TCP and through shared memory,
  checksums included, sender and receiver together on one core: bytes per second of their CPU time,
  and by the clock.
- ttft: SmolLM2's time to the first token of 512 through a hand-over on this host, beside none.
- hidden: it pushes prompts of 512 and 2,000 tokens over an emulated link of 1 Gbit/s (network
  namespaces and tc; needs root): the share of the transfer that is over when the prompt is
  computed.
- packed: the same over 30 Mbit/s, 512 tokens: what is left after prefill, packed beside raw.

Exits with 1 if a figure misses its goal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from engine_process import cpu_seconds
from kv_ends import (
    SECRET,
    Sink,
    can_emulate,
    decode_worker,
    job_of,
    looping,
    slow_link,
)

from scheduler.blocks import blocks_for
from scheduler.messages import FirstToken
from workers.build import EngineOptions, build, find
from workers.held import Held
from workers.kv_send import KvSender
from workers.kv_wire import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scheduler.messages import Peer
    from workers.engine import Engine
    from workers.engine_loop import EngineLoop

MODEL = "smollm2-135m-instruct"
TOKENS, RUNS = 2000, 12
PROMPTS = (512, 2000)
LINK, SLOW = "1gbit", "30mbit"


class Figure(msgspec.Struct, frozen=True):
    """A measured number and the least that it should be."""

    name: str
    value: float
    least: float
    unit: str
    detail: str
    most: bool = False  # or rather the most

    @property
    def holds(self) -> bool:
        return self.value <= self.least if self.most else self.value >= self.least


# ── rates ───────────────────────────────────────────────────────────────────────────────────────


def rates(args: argparse.Namespace) -> list[Figure]:
    tokens, runs = (200, 3) if args.tiny else (TOKENS, RUNS)
    with one_core(), decode_worker("127.0.0.1", blocks_for(tokens + 1), "float16") as (peer, pid):
        ways = (("tcp", False, 1.0), ("memory", True, 3.0))
        return [asyncio.run(stream(peer, pid, tokens, runs, *way)) for way in ways]


async def stream(
    peer: Peer, pid: int, tokens: int, runs: int, name: str, share: bool, least: float
) -> Figure:
    """Push a prompt's KV again and again."""
    cache = Sink(blocks_for(tokens), "float16").cache
    held = Held(list(range(cache.blocks)), tokens, (FirstToken(0, 97, 1),))

    async def computed() -> Held:
        return held

    sender = KvSender("bench", "bench", cache, SECRET, Limits(share=share))
    walls, cpus = [], []
    for _ in range(runs + 1):
        async with sender.reserve(job_of([97] * tokens), peer) as lease:
            begun, busy = time.perf_counter(), time.process_time() + cpu_seconds([pid])
            await lease.push(computed())
            walls.append(time.perf_counter() - begun)
            cpus.append(time.process_time() + cpu_seconds([pid]) - busy)
    size = lease.bytes_sent
    sender.close()
    wall, cpu = size / median(walls[1:]) / 1e9, size / median(cpus[1:]) / 1e9
    detail = f"{size / 1e6:.1f} MB, median of {runs}; {wall:.2f} GB/s by the clock"
    return Figure(name, cpu, least, "GB/s", detail)


@contextmanager
def one_core() -> Iterator[None]:
    """This process, and those that it starts, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


# ── beside a model that computes ────────────────────────────────────────────────────────────────


class Times(NamedTuple):
    """Of one prompt that is computed here and goes on there, in seconds."""

    first: float  # until its first token, from before blocks were reserved
    prefill: float  # the same from after that
    rest: float  # and from then until all KV is there


def model(args: argparse.Namespace) -> Engine:
    options = EngineOptions(kv_tokens=4096, threads=args.threads, speculate=False)
    return build(find(MODEL), options)[0]


def ttft(args: argparse.Namespace) -> list[Figure]:
    """The time to the first token through a hand-over on this host, beside that without one."""
    engine, runs = model(args), 1 if args.tiny else 15
    cache = engine.runner.cache
    with decode_worker("127.0.0.1", cache.blocks, cache.dtype) as (peer, _):
        return [asyncio.run(ttft_of(engine, peer, runs))]


async def ttft_of(engine: Engine, peer: Peer, runs: int) -> Figure:
    split, whole, busy, length = [], [], [0.0, 0.0], PROMPTS[0]
    async with looping(engine) as loop:
        sender = KvSender("bench", "bench", engine.runner.cache, SECRET)
        for seed in range(runs + 1):
            started = time.process_time()
            split.append((await hand_over(loop, sender, peer, prompt_of(length, 2 * seed))).first)
            between = time.process_time()
            whole.append(await alone(loop, prompt_of(length, 2 * seed + 1)))
            busy[0] += between - started
            busy[1] += time.process_time() - between
        sender.close()
    ratio = median(split[1:]) / median(whole[1:])
    detail = (
        f"{1000 * median(split[1:]):.0f} ms and {1000 * median(whole[1:]):.0f} ms, "
        f"medians of {runs} in turn; CPU time of the process {busy[0] / busy[1]:.3f} times"
    )
    return Figure("ttft, 512", ratio, 1.10, "times", detail, most=True)


def hidden(args: argparse.Namespace) -> list[Figure]:
    """The share of a transfer that prefill hides: 1 - what is left after it / the whole, alone."""
    if not can_emulate():
        return []
    engine, runs = model(args), 1 if args.tiny else 5
    cache = engine.runner.cache
    with (
        slow_link(LINK) as (host, prefix),
        decode_worker(host, cache.blocks, cache.dtype, prefix) as (peer, _),
    ):
        return asyncio.run(hidden_of(engine, peer, PROMPTS[: 1 if args.tiny else None], runs))


async def hidden_of(
    engine: Engine, peer: Peer, lengths: tuple[int, ...], runs: int
) -> list[Figure]:
    figures = []
    async with looping(engine) as loop:
        sender = KvSender("bench", "bench", engine.runner.cache, SECRET, Limits(share=False))
        for length in lengths:
            early, late = [], []
            for seed in range(runs + 1):
                prompts = [prompt_of(length, 2 * seed + which) for which in (0, 1)]
                early.append(await hand_over(loop, sender, peer, prompts[0]))
                late.append(await hand_over(loop, sender, peer, prompts[1], early=False))
            rest = median(times.rest for times in early[1:])
            whole = median(times.rest for times in late[1:])
            detail = (
                f"{1000 * rest:.0f} ms of {1000 * whole:.0f} ms are left after a prefill of "
                f"{1000 * median(times.prefill for times in early[1:]):.0f} ms"
            )
            figures.append(Figure(f"hidden, {length}", 100 * (1 - rest / whole), 80.0, "%", detail))
        sender.close()
    return figures


def packed(args: argparse.Namespace) -> list[Figure]:
    """Over a link that is too slow for raw KV: what is left after prefill, raw beside packed."""
    if not can_emulate():
        return []
    engine, runs = model(args), 1 if args.tiny else 5
    cache = engine.runner.cache
    with (
        slow_link(SLOW) as (host, prefix),
        decode_worker(host, cache.blocks, cache.dtype, prefix) as (peer, _),
    ):
        return asyncio.run(packed_of(engine, peer, runs))


async def packed_of(engine: Engine, peer: Peer, runs: int) -> list[Figure]:
    lefts, sizes = {}, {}
    async with looping(engine) as loop:
        for number, codecs in enumerate((("raw",), ("raw", "int8"), ("raw", "int8", "int4"))):
            limits = Limits(share=False, codecs=codecs)
            sender = KvSender("bench", "bench", engine.runner.cache, SECRET, limits)
            left = []
            for seed in range(runs + 1):  # the first one measures the link
                before = sender.bytes_sent
                prompt = prompt_of(PROMPTS[0], 100 * number + seed)
                left.append((await hand_over(loop, sender, peer, prompt)).rest)
            lefts[codecs[-1]], sizes[codecs[-1]] = median(left[1:]), sender.bytes_sent - before
            sender.close()
    return [
        Figure(
            f"{codec}, {SLOW}",
            lefts["raw"] / lefts[codec],
            1.0,
            "times",
            f"{1000 * lefts[codec]:.0f} ms left of {sizes[codec] / 1e6:.1f} MB, "
            f"{1000 * lefts['raw']:.0f} ms of {sizes['raw'] / 1e6:.1f} MB raw",
        )
        for codec in ("int8", "int4")
    ]


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(100, 40_000), k=length)


async def alone(loop: EngineLoop, prompt: list[int]) -> float:
    """Seconds until a prompt's first token, where it stays."""
    job, begun = job_of(prompt, "alone"), time.perf_counter()
    await loop.prefill(job, prompt)
    ended = time.perf_counter()
    loop.release((job.id, job.epoch))
    return ended - begun


async def hand_over(
    loop: EngineLoop, sender: KvSender, peer: Peer, prompt: list[int], *, early: bool = True
) -> Times:
    """Compute a prompt and push it: `early` while it is computed, or only then."""
    job, begun = job_of(prompt), time.perf_counter()
    reserved = done = begun

    async def computed() -> Held:
        nonlocal done
        held = await loop.prefill(job, prompt, lease.watch if early else None)
        done = time.perf_counter()
        return Held(held.blocks, held.tokens, (FirstToken(0, 97, 1),))  # that the far end can spell

    async with sender.reserve(job, peer) as lease:
        reserved = time.perf_counter()
        await lease.push(computed())
        ended = time.perf_counter()
    loop.release((job.id, job.epoch))
    return Times(done - begun, done - reserved, ended - done)


MEASURES: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "rates": rates,
    "ttft": ttft,
    "hidden": hidden,
    "packed": packed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--tiny", action="store_true", help="little and quick: does it still run?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default=",".join(MEASURES), help="some of these, by name")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(MEASURES):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(MEASURES)}")
    figures = []
    for name in args.only.split(","):
        for figure in MEASURES[name](args):
            figures.append(figure)
            print_figure(figure, as_json=args.json)
    return 0 if args.tiny or all(figure.holds for figure in figures) else 1


def print_figure(figure: Figure, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(figure).decode(), flush=True)
        return
    goal = f"(at {'most' if figure.most else 'least'} {figure.least:g} {figure.unit})"
    verdict = "" if figure.holds else "  MISSED"
    print(f"{figure.name:16}{figure.value:>8.2f} {figure.unit} {goal}: {figure.detail}{verdict}")


if __name__ == "__main__":
    sys.exit(main())
