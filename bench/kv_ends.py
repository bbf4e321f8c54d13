"""The two ends of a KV hand-over for bench/kv_transfer.py: a decode worker as a process, a sender.

    python bench/kv_ends.py HOST BLOCKS DTYPE

prints its port and receives until its standard input ends. It has the
cache of SmolLM2-135M and the live receiver, but no model: a token is drawn at once.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.messages import Address, Peer
from scheduler.models import ModelShape
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.transport import listen
from workers.engine import Engine
from workers.engine_loop import EngineLoop
from workers.fake import FakeText
from workers.kv_cache import KvCache
from workers.kv_receive import KvReceiver
from workers.runner import NO_WISHES, Sampled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from scheduler.batching import Slice
    from workers.runner import Runner, Wishes

HERE, THERE = "10.78.0.1", "10.78.0.2"
SECRET = b"of this benchmark"
SMOLLM2 = ModelShape(
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    vocab=49152,
    context_length=8192,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied_embeddings=True,
)


class Sink:
    """A runner with a cache and no model."""

    vocab = SMOLLM2.vocab

    def __init__(self, blocks: int, dtype: str) -> None:
        self.cache = KvCache(SMOLLM2, blocks, dtype)
        self.cache.data[:] = 1  # pages are touched

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        return [Sampled(97) for piece in slices for _ in range(piece.draws)]


@asynccontextmanager
async def looping(engine: Engine) -> AsyncIterator[EngineLoop]:
    """An engine in its loop; what it says is for nobody."""

    async def ignore(*_: object) -> None:
        pass

    loop = EngineLoop(engine, ignore, ignore)
    task = asyncio.create_task(loop.run())
    try:
        yield loop
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def engine_of(runner: Runner) -> Engine:
    return Engine(runner, FakeText(1 << 20), Batcher(BlockPool(runner.cache.blocks)))


def job_of(prompt: list[int], name: str = "bench") -> Job:
    return Job(
        id=name,
        epoch=1,
        model="",
        prompt=Prompt(ids=prompt),
        sampling=Sampling(seed=0, temperature=0.0),
        limits=Limits(max_tokens=2, ignore_eos=True),
        created=0.0,
    )


@contextmanager
def decode_worker(
    host: str, blocks: int, dtype: str, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[Peer, int]]:
    """A decode worker as a process: (where it listens, its process id)."""
    words = [*prefix, sys.executable, __file__, host, str(blocks), dtype]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin, "a pipe"
    assert process.stdout, "a pipe"
    try:
        port = int(process.stdout.readline())
        yield Peer("decode", Address(host, port)), process.pid
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def can_emulate() -> bool:
    """Whether this machine lets us make a slow link."""
    able = os.geteuid() == 0 and bool(shutil.which("ip") and shutil.which("tc"))
    if not able:
        print("left out: network namespaces need root and iproute2", file=sys.stderr)
    return able


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Another host behind a link of so many bits: its address, and what runs a command there."""
    far, near = f"motley-bench-{os.getpid()}", f"mb{os.getpid()}"[:14]

    def command(words: str) -> None:
        subprocess.run(words.split(), check=True, capture_output=True, timeout=10)

    with ExitStack() as stack:
        command(f"ip netns add {far}")
        stack.callback(command, f"ip netns delete {far}")
        command(f"ip link add {near} type veth peer far netns {far}")
        command(f"ip address add {HERE}/24 dev {near}")
        command(f"ip link set {near} up")
        command(f"ip -n {far} address add {THERE}/24 dev far")
        command(f"ip -n {far} link set far up")
        command(f"ip -n {far} link set lo up")
        command(f"tc qdisc add dev {near} root tbf rate {rate} burst 128kb latency 50ms")
        yield THERE, ("ip", "netns", "exec", far)


async def serve(host: str, blocks: int, dtype: str) -> None:
    engine = engine_of(Sink(blocks, dtype))
    async with looping(engine) as loop:
        receiver = KvReceiver("bench", engine.runner.cache, loop)
        async with listen(host, 0, SECRET, receiver.serve) as bound:
            print(bound[1], flush=True)
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
