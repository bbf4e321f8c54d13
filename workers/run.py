"""The worker process, from its options to its end."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.service import WorkerService


async def run_worker(service: WorkerService, stop: asyncio.Event, *, child: bool) -> None:
    """Serve until `stop`, then drain. A `child` also ends when its standard input closes.

    Raises SetupError if the router refuses the worker.
    """
    work = asyncio.create_task(service.run())
    watches: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait())]
    if child:
        watches.append(asyncio.create_task(_input_closed()))
    try:
        await asyncio.wait([work, *watches], return_when=asyncio.FIRST_COMPLETED)
        service.leave()
        await work
    finally:
        for task in (work, *watches):
            task.cancel()
        await asyncio.gather(work, *watches, return_exceptions=True)


async def _input_closed() -> None:
    """Wait for the end of standard input: whoever started us holds it open while it lives."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    try:
        with suppress(ConnectionError):
            await reader.read()
    finally:
        transport.close()
