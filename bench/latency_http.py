"""What HTTP clients see of tokens; a part of bench/latency.py, memory.py and fidelity.py."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    Tokens = list[int]

READY_S, STOP_S, SILENCE_S = 60, 15, 60
WARM_TOKENS = 30  # of each stream before the long prompt comes


def gaps(
    model: str, words: Sequence[str], streams: list[Tokens], long: Tokens, *, tokens: int
) -> list[float]:
    """Milliseconds between the pieces of each stream, while `long` waits for its first token.

    Starts `motley serve` with these words. Raises RuntimeError if a stream ends before that.
    """
    return asyncio.run(_gaps(model, words, streams, long, tokens))


async def _gaps(
    model: str, words: Sequence[str], streams: list[Tokens], long: Tokens, tokens: int
) -> list[float]:
    timeout = aiohttp.ClientTimeout(sock_read=SILENCE_S)
    async with serving(model, words) as (url, _), aiohttp.ClientSession(timeout=timeout) as session:
        times: list[list[float]] = [[] for _ in streams]
        warm = asyncio.Event()

        async def follow(index: int) -> None:
            async for now in pieces(session, url, model, streams[index], tokens):
                times[index].append(now)
                if min(map(len, times)) >= WARM_TOKENS:
                    warm.set()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(follow(index)) for index in range(len(streams))]
            await asyncio.wait_for(warm.wait(), SILENCE_S)
            begin = time.perf_counter()
            ends = [now async for now in pieces(session, url, model, long, 1)]
            if any(task.done() for task in tasks):
                raise RuntimeError("a stream ended before the long prompt's first token")
            for task in tasks:
                task.cancel()
        return [
            1000 * (after - before)
            for stream in times
            for before, after in pairwise(stream)
            if after >= begin and before <= ends[0]
        ]


async def pieces(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Tokens, tokens: int
) -> AsyncIterator[float]:
    """When each piece of the answer arrives."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                yield time.perf_counter()


@contextlib.asynccontextmanager
async def serving(model: str, words: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """`motley serve` with one mixed worker, while the block lasts: its URL and process id."""
    roles = ("--prefill", "0", "--decode", "0", "--mixed", "1", "--port", "0")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "motley", "serve", model, *roles, *words),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout, "started with a pipe"
        async with asyncio.timeout(READY_S):
            async for line in process.stdout:
                if found := re.search(rb"ready: (\S+)", line):
                    break
            else:
                raise RuntimeError("motley serve ended before it was ready")
        yield found.group(1).decode(), process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
