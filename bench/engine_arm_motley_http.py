"""Motley as bench/engine.py runs it over HTTP: `motley serve` with one mixed worker."""

from __future__ import annotations

import asyncio
import atexit
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from engine_arm_motley import commit
from engine_process import UNTOLD, Emitted, Facts, Setup, Tokens, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "bench"
SILENCE_S = 300
STOP_S = 15


class MotleyHttp:
    """Variants: as engine_arm_motley.py."""

    def __init__(self, setup: Setup) -> None:
        words = ["--prefill", "0", "--decode", "0", "--mixed", "1", "--port", "0"]
        words += ["--mode", "exact"] if setup.variant == "exact" else []
        words += [] if setup.variant == "speculate" else ["--no-speculation"]
        words += ["--threads", str(setup.threads), "--kv-tokens", str(setup.kv_tokens)]
        self._router = subprocess.Popen(
            [sys.executable, "-m", "motley", "serve", f"{NAME}={setup.model}", *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(self._open_session())
        atexit.register(self._stop)
        self._arrived: asyncio.Queue[Emitted] = asyncio.Queue()
        self._url = self._ready()
        self.facts = Facts(
            version=commit(), weight_bytes=Path(setup.model).stat().st_size, kv_bytes=None
        )

    def run(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        left = len(prompts) * new_tokens
        clients = [
            self._loop.create_task(self._request(index, prompt, new_tokens))
            for index, prompt in enumerate(prompts)
        ]
        while left:
            emitted = self._loop.run_until_complete(
                asyncio.wait_for(self._arrived.get(), SILENCE_S)
            )
            left -= len(emitted)
            yield emitted
        self._loop.run_until_complete(asyncio.gather(*clients))

    def processes(self) -> list[int]:
        """The router and its worker."""
        router = self._router.pid
        children = Path(f"/proc/{router}/task/{router}/children").read_text().split()
        return [router, *map(int, children)]

    async def _request(self, index: int, prompt: Tokens, new_tokens: int) -> None:
        """One stream: each piece of text counts as a token, the last as all that are left."""
        body = {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        left = new_tokens
        async with self._session.post(f"{self._url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                choice = msgspec.json.decode(line[6:])["choices"][0]
                count = left if choice["finish_reason"] else min(1, left - 1)
                if count:
                    self._arrived.put_nowait([(index, UNTOLD)] * count)
                left -= count

    @staticmethod
    async def _open_session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_read=SILENCE_S))

    def _ready(self) -> str:
        assert self._router.stdout, "started with a pipe"
        for line in self._router.stdout:
            if found := re.search(r"ready: (\S+)", line):
                return found.group(1)
        raise RuntimeError("motley serve ended before it was ready")

    def _stop(self) -> None:
        self._loop.run_until_complete(self._session.close())
        self._router.terminate()
        try:
            self._router.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._router.kill()


if __name__ == "__main__":
    serve(MotleyHttp)
