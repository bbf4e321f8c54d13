"""Many buffers through one socket call: what a KV cache in pages is sent and received by."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

_MOST = 512  # buffers that one call takes: half of what Linux allows


async def send_all(sock: socket.socket, parts: list[memoryview]) -> None:
    """Send byte views in order. The socket does not block; the list is used up.

    What is added to it meanwhile is sent too.
    """
    while not send_some(sock, parts):
        await _writable(sock)


def send_some(sock: socket.socket, parts: list[memoryview]) -> bool:
    """Send what the socket takes now; True: all of it. The rest stays in the list."""
    try:
        while parts:
            advance(parts, sock.sendmsg(parts[:_MOST]))
    except BlockingIOError:
        return False
    return True


class Reader:
    """Reads one socket, which does not block.

    The event loop watches it from one read to the next: to begin a watch for each read costs more
    than most reads. A watch that finds nobody waiting ends, and so must the reader before its
    socket is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._empty = True  # as far as is known: to ask in vain costs as much as to read
        self._watching: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def some(self, views: list[memoryview]) -> int:
        """Wait for bytes and fill byte views in order with them; their number, 0 at the end."""
        while True:
            if self._empty:
                await self._readable()
            try:
                count = self._sock.recvmsg_into(views[:_MOST])[0]
            except BlockingIOError:
                self._empty = True
            else:
                self._empty = len(views) == 1 and count < views[0].nbytes
                advance(views, count)
                return count

    def end(self) -> None:
        """Watch no more. Idempotent."""
        if self._watching:
            self._watching.remove_reader(self._sock)
            self._watching = None

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        if self._watching is None:
            loop.add_reader(self._sock, self._ready)
            self._watching = loop
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _ready(self) -> None:
        if self._waiter is None:
            self.end()
        elif not self._waiter.done():
            self._waiter.set_result(None)


def advance(views: list[memoryview], count: int) -> None:
    """Take off the first `count` bytes, and views that have none left."""
    done = 0
    while done < len(views) and count >= views[done].nbytes:
        count -= views[done].nbytes
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_writer(sock)
