"""A whole run: in this process, or shared out over several that send what they saw here."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from time import monotonic, time
from typing import TYPE_CHECKING

import msgspec

from loadtest.errors import LoadtestError
from loadtest.outcome import Outcome
from loadtest.run import Part, Runner
from loadtest.spec import Spec
from loadtest.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAD = 0.05  # seconds from "ready" to the first request
_READY_LIMIT = 30.0  # seconds for client processes to start
_TOLD_EVERY = 0.25
_FRAME_LIMIT = 256 * 1024 * 1024


class Run(msgspec.Struct):
    """What was asked, what came of it in order of schedule, and what the client says of itself."""

    spec: Spec
    workload: Workload
    outcomes: list[Outcome]
    parts: list[Part]
    began: float  # Unix seconds of the schedule's start


class Measurement:
    """One run under way. `outcomes` grows while it runs; `stop` ends it early."""

    def __init__(self, spec: Spec, workload: Workload | None = None) -> None:
        self.spec = spec
        self.workload = workload or Workload(spec)
        self.outcomes: list[Outcome] = []
        self.start = 0.0
        self.started = asyncio.Event()  # `start` is known
        self._stop: Callable[[], None] = lambda: None

    def stop(self) -> None:
        self._stop()

    async def run(self) -> Run:
        """Raises LoadtestError when a client process dies."""
        if self.spec.processes == 1:
            runner = Runner(self.spec, self.workload, self.outcomes.append)
            self._stop = runner.stop
            self._begin(_LEAD)
            parts = [await runner.run(self.start)]
        else:
            parts = await self._run_processes()
        ordered = sorted(self.outcomes, key=lambda outcome: outcome.scheduled)
        began = time() - (monotonic() - self.start)
        return Run(self.spec, self.workload, ordered, list(parts), began)

    async def _run_processes(self) -> list[Part]:
        processes = [await self._spawn(part) for part in range(self.spec.processes)]
        self._stop = partial(_hang_up, processes)
        try:
            async with asyncio.timeout(_READY_LIMIT):
                for process in processes:
                    await _news(process)  # it is ready
            self._begin(_LEAD)
            for process in processes:
                _write(process, _Start(self.start))
            return await asyncio.gather(*(self._listen(process) for process in processes))
        except TimeoutError:
            raise LoadtestError(f"client processes did not start in {_READY_LIMIT:g} s") from None
        finally:
            for process in processes:
                await _end(process)

    def _begin(self, lead: float) -> None:
        self.start = monotonic() + lead
        self.started.set()

    async def _spawn(self, part: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadtest",
            "_part",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        _write(process, _Order(self.spec, part))
        return process

    async def _listen(self, process: asyncio.subprocess.Process) -> Part:
        while True:
            news = await _news(process)
            self.outcomes.extend(news.outcomes)
            if news.part is not None:
                return news.part


class _Order(msgspec.Struct):
    spec: Spec
    part: int


class _Start(msgspec.Struct):
    at: float  # CLOCK_MONOTONIC is one for all processes of a machine


class _News(msgspec.Struct):
    outcomes: list[Outcome]
    part: Part | None = None


async def serve_part() -> None:
    """A client process: its order on stdin, its news on stdout; it stops when stdin closes."""
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader(limit=_FRAME_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin.buffer)
    order = msgspec.msgpack.decode(await _read_frame(stdin), type=_Order)
    unsent: list[Outcome] = []

    def tell(part: Part | None = None) -> None:
        sys.stdout.buffer.write(_frame(_News(unsent, part)))
        sys.stdout.buffer.flush()
        unsent.clear()

    async def tell_often() -> None:
        while True:
            await asyncio.sleep(_TOLD_EVERY)
            tell()

    async def obey() -> None:
        await stdin.read()
        runner.stop()

    workload = Workload(order.spec)
    runner = Runner(order.spec, workload, unsent.append, order.part, order.spec.processes)
    tell()  # ready
    start = msgspec.msgpack.decode(await _read_frame(stdin), type=_Start)
    helpers = [loop.create_task(tell_often()), loop.create_task(obey())]
    part = await runner.run(start.at)
    for helper in helpers:
        helper.cancel()
    tell(part)


def _frame(message: msgspec.Struct) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "big") + data


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def _write(process: asyncio.subprocess.Process, message: msgspec.Struct) -> None:
    assert process.stdin is not None, "a pipe was asked for"
    process.stdin.write(_frame(message))


async def _news(process: asyncio.subprocess.Process) -> _News:
    assert process.stdout is not None, "a pipe was asked for"
    try:
        return msgspec.msgpack.decode(await _read_frame(process.stdout), type=_News)
    except asyncio.IncompleteReadError:
        raise LoadtestError("a client process of the load test ended by itself") from None


def _hang_up(processes: list[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    _hang_up([process])
    try:
        await asyncio.wait_for(process.wait(), timeout=5)
    except TimeoutError:
        process.kill()
        await process.wait()
