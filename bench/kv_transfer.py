"""How fast a KV cache gets from one worker to another, and how much of that hides behind prefill.

    python bench/kv_transfer.py [--tiny] [--json] [--only rates,hidden] [--threads N]

- rates: KV of SmolLM2-135M in float16, one stream, over loopback TCP and through shared memory,
  checksums included, sender and receiver together on one core: bytes per second of their CPU time,
  and by the clock.
- hidden: SmolLM2 computes prompts of 512 and 2,000 tokens and pushes them over an emulated link of
  1 Gbit/s (network namespaces and tc; needs root): the share of the transfer that is over when the
  prompt is computed, and the time to the first token beside no push at all.

Exits with 1 if a figure misses its goal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from kv_ends import SECRET, Sink, cpu_s, decode_worker, job_of, looping

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
LINK = "1gbit"
HERE, THERE = "10.78.0.1", "10.78.0.2"


class Figure(msgspec.Struct, frozen=True):
    """A measured number and the least that it should be."""

    name: str
    value: float
    least: float
    unit: str
    detail: str

    @property
    def holds(self) -> bool:
        return self.value >= self.least


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
            begun, busy = time.perf_counter(), time.process_time() + cpu_s(pid)
            await lease.push(computed())
            walls.append(time.perf_counter() - begun)
            cpus.append(time.process_time() + cpu_s(pid) - busy)
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


# ── hiding ──────────────────────────────────────────────────────────────────────────────────────


def hidden(args: argparse.Namespace) -> list[Figure]:
    """The share of a transfer that prefill hides: 1 - what is left after it / the whole, alone."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        print("hidden: left out: network namespaces need root and iproute2", file=sys.stderr)
        return []
    options = EngineOptions(kv_tokens=4096, threads=args.threads, speculate=False)
    engine = build(find(MODEL), options)[0]
    with slow_link() as far:
        blocks = engine.runner.cache.blocks
        dtype = engine.runner.cache.dtype
        with decode_worker(THERE, blocks, dtype, ("ip", "netns", "exec", far)) as (peer, _):
            return asyncio.run(hidden_of(engine, peer, 1 if args.tiny else 5))


async def hidden_of(engine: Engine, peer: Peer, runs: int) -> list[Figure]:
    figures = []
    async with looping(engine) as loop:
        sender = KvSender("bench", "bench", engine.runner.cache, SECRET)
        for length in PROMPTS:
            timed = [
                [
                    await hand_over(loop, sender, peer, length, seed, early=early)
                    for early in (1, 0, 2)
                ]
                for seed in range(runs + 1)
            ][1:]
            early, late, none = (np.array(column).T for column in zip(*timed, strict=True))
            rest, whole = median(early[1]), median(late[1])
            detail = (
                f"{1000 * rest:.0f} ms of {1000 * whole:.0f} ms after a prefill of "
                f"{1000 * median(early[0]):.0f} ms ({1000 * median(none[0]):.0f} ms alone)"
            )
            figures.append(Figure(f"hidden, {length}", 100 * (1 - rest / whole), 80.0, "%", detail))
        sender.close()
    return figures


async def hand_over(
    loop: EngineLoop, sender: KvSender, peer: Peer, length: int, seed: int, early: int
) -> tuple[float, float]:
    """Seconds until the prompt is computed, and from then until all KV is there.

    `early` is 1 to push while it is computed, 0 to push it then, 2 to push nothing.
    """
    prompt = random.Random(seed * 10 + early).choices(range(100, 40_000), k=length)
    job = job_of(prompt, f"{length} {seed} {early}")
    done = 0.0
    begun = time.perf_counter()

    async def computed() -> Held:
        nonlocal done
        held = await loop.prefill(job, prompt, lease.watch if early == 1 else None)
        done = time.perf_counter()
        firsts = (FirstToken(0, 97, 1),) if early < 2 else ()  # one that the far end can spell
        return Held(held.blocks, held.tokens, firsts)

    async with sender.reserve(job, peer) as lease:
        begun = time.perf_counter()
        await lease.push(computed())
        ended = time.perf_counter()
    loop.release((job.id, job.epoch))
    return done - begun, ended - done


@contextmanager
def slow_link() -> Iterator[str]:
    """Another host behind a link of LINK: the name of its network namespace."""
    far = f"motley-bench-{os.getpid()}"
    near = f"mb{os.getpid()}"[:14]

    def ip(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, timeout=10)

    with ExitStack() as stack:
        ip("ip", "netns", "add", far)
        stack.callback(ip, "ip", "netns", "delete", far)
        ip("ip", "link", "add", near, "type", "veth", "peer", "far", "netns", far)
        ip("ip", "address", "add", f"{HERE}/24", "dev", near)
        ip("ip", "link", "set", near, "up")
        ip("ip", "-n", far, "address", "add", f"{THERE}/24", "dev", "far")
        ip("ip", "-n", far, "link", "set", "far", "up")
        ip("ip", "-n", far, "link", "set", "lo", "up")
        shape = ("tbf", "rate", LINK, "burst", "128kb", "latency", "50ms")
        ip("tc", "qdisc", "add", "dev", near, "root", *shape)
        yield far


MEASURES: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "rates": rates,
    "hidden": hidden,
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
    goal = f"(at least {figure.least:g} {figure.unit})"
    verdict = "" if figure.holds else "  BELOW"
    print(f"{figure.name:16}{figure.value:>8.2f} {figure.unit} {goal}: {figure.detail}{verdict}")


if __name__ == "__main__":
    sys.exit(main())
