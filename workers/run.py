"""The worker process, from its options to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.group.member import MemberConfig
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


def run_rank(config: MemberConfig, *, child: bool) -> None:
    """Be a rank of a group until the process ends. A `child` also ends with its standard input.

    A rank keeps nothing that others need, so it may end at any moment. Raises SetupError if rank 0
    refuses it.
    """
    from workers.group.member import run_member

    if child:
        threading.Thread(target=end_with_input, name="input", daemon=True).start()
    run_member(config, threading.Event())


def end_with_input() -> None:
    """Ask this process to end when its standard input closes: for a thread."""
    while os.read(0, 4096):  # not sys.stdin: its lock is held for ever, and asked for at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)


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
