"""Many buffers through one socket call: what a KV cache in pages is sent and received by."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_MOST = 512  # buffers that one call takes: half of what Linux allows


async def send_all(sock: socket.socket, parts: list[memoryview]) -> None:
    """Send byte views in order. The socket does not block; the list is used up."""
    loop = asyncio.get_running_loop()
    while parts:
        try:
            count = sock.sendmsg(parts[:_MOST])
        except BlockingIOError:
            await _possible(sock, loop.add_writer, loop.remove_writer)
        else:
            advance(parts, count)


async def receive_some(sock: socket.socket, views: list[memoryview]) -> int:
    """Wait for bytes and fill byte views in order with them; gives their number, 0 at the end."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            count = sock.recvmsg_into(views[:_MOST])[0]
        except BlockingIOError:
            await _possible(sock, loop.add_reader, loop.remove_reader)
        else:
            advance(views, count)
            return count


def advance(views: list[memoryview], count: int) -> None:
    """Take off the first `count` bytes, and views that have none left."""
    done = 0
    while done < len(views) and count >= views[done].nbytes:
        count -= views[done].nbytes
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]


async def _possible(
    sock: socket.socket,
    watch: Callable[[socket.socket, Callable[[], None]], None],
    leave: Callable[[socket.socket], bool],
) -> None:
    """Wait until the socket can be written, or read."""
    ready = asyncio.get_running_loop().create_future()
    watch(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        leave(sock)
