"""What one HTTP request reads from: the deltas of all its prompts, as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scheduler.errors import MotleyError
    from serving.ask import Delta


class Stream:
    """The deltas of one request, over all its prompts."""

    def __init__(self, generations: int) -> None:
        self.prompt_tokens = 0
        self.eager = True
        self._fed = False
        self._unaccepted = generations
        self._unfinished = generations
        self._deltas: deque[Delta] = deque()
        self._error: MotleyError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def accepted(self) -> None:
        """Wait until every prompt is accepted. Raises what ended the request instead."""
        while self._unaccepted and not self._error:
            await self._wait()
        if self._error:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            while self._deltas:
                yield self._deltas.popleft()
            if self._error:
                raise self._error
            if not self._unfinished:
                return
            await self._wait()

    def start(self, prompt_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self._unaccepted -= 1
        self._wake()

    def feed(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if self._waiter is not None and (self.eager or not self._fed):
            self._fed = True
            self._wake()

    def end(self, error: MotleyError | None) -> None:
        """One generation has ended; an error ends them all."""
        self._unfinished -= 1
        self._error = self._error or error
        self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
