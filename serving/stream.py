"""What one HTTP request is given: the deltas of all its prompts, as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Delta = TypeVar("Delta")


class Stream(Generic[Delta]):
    """The deltas of one request, over all its prompts.

    They are given away where they arrive: to wake a task for each costs more than all else that a
    token needs.
    """

    def __init__(self, generations: int) -> None:
        self.prompt_tokens = 0
        self._unaccepted = generations
        self._unfinished = generations
        self._waiting: deque[Delta] = deque()  # nobody takes them now
        self._take: Callable[[Delta], bool] | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def accepted(self) -> None:
        """Wait until every prompt is accepted. Raises what ended the request instead."""
        while self._unaccepted and not self._error:
            await self._wait()
        if self._error:
            raise self._error

    async def pour(self, take: Callable[[Delta], bool]) -> bool:
        """See ask.Stream.pour."""
        while self._waiting:
            if not take(self._waiting.popleft()):
                return False
        self._take = take
        try:
            while self._take is not None and self._unfinished and not self._error:
                await self._wait()
            room = self._take is not None
        finally:
            self._take = None
        if self._error and not self._waiting:
            raise self._error
        return room

    def start(self, prompt_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self._unaccepted -= 1
        self._wake()

    def feed(self, delta: Delta) -> None:
        if self._take is None:
            if not self._error:
                self._waiting.append(delta)
            return
        try:
            if self._take(delta):
                return
        except Exception as error:  # noqa: BLE001 - it is the reader's, and not the worker's
            self._error = error
        self._take = None
        self._wake()

    def end(self, error: Exception | None) -> None:
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
