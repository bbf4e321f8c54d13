"""The decode worker's end of a KV hand-over: blocks are reserved first, and filled in place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

from scheduler.admission import same_model
from scheduler.errors import BadRequest, HandoffFailed, ProtocolError
from scheduler.messages import (
    Again,
    Commit,
    Committed,
    KvBlocks,
    Refused,
    Reserve,
    Reserved,
    Taken,
)
from workers.host_memory import host
from workers.kv_arrival import Arrival
from workers.kv_memory import OwnMemory
from workers.kv_pack import known
from workers.kv_wire import common, intact

if TYPE_CHECKING:
    from scheduler.batching import Sequence
    from scheduler.messages import Wire
    from scheduler.transport import Connection
    from workers.engine import Key
    from workers.engine_loop import EngineLoop
    from workers.kv_cache import KvCache

logger = logging.getLogger(__name__)


def _memory_for(reserve: Reserve) -> OwnMemory | None:
    """Memory to share with this sender, if it can share any."""
    if not reserve.host or reserve.host != host() or not common(reserve.checksums):
        return None
    try:
        return OwnMemory()
    except OSError as error:
        logger.warning("no memory to share with %s: %s", reserve.prefill, error)
        return None


REMEMBERED = 256  # cancelled jobs, whose reservation may still be on its way


class KvReceiver:
    """`serve` handles one connection from one prefill worker."""

    def __init__(self, fingerprint: str, cache: KvCache, loop: EngineLoop) -> None:
        self.bytes_received = 0
        self.damaged = 0  # chunks that were asked for again
        self._fingerprint = fingerprint
        self._cache = cache
        self._loop = loop
        self._receiving: dict[Key, asyncio.Task[None]] = {}
        self._cancelled: deque[Key] = deque(maxlen=REMEMBERED)
        self._busy: Counter[str] = Counter()  # chunks that arrive right now, by their sender's host

    async def serve(self, connection: Connection) -> None:
        """Take hand-overs until the connection ends."""
        with ExitStack() as stack:
            memory: OwnMemory | None = None
            while True:
                reserve = await connection.expect(Reserve)
                if memory is None and (memory := _memory_for(reserve)):
                    stack.callback(memory.close)
                try:
                    await self._take(connection, memory, reserve)
                except (HandoffFailed, BadRequest, TimeoutError) as error:
                    reason = str(error) or "the lease ran out"
                    logger.warning("job %s from %s: %s", reserve.job.id, reserve.prefill, reason)
                except (ConnectionError, ProtocolError):
                    raise  # nobody is there to be told
                except Exception as error:  # the prefill worker is told, the job goes elsewhere
                    reason = f"{type(error).__name__}: {error}"
                    logger.exception("job %s from %s failed", reserve.job.id, reserve.prefill)
                else:
                    continue
                await connection.send(Refused(reason))
                return

    def cancel(self, key: Key) -> bool:
        """Stop receiving a job, or refuse it if it comes later. False if none is under way.

        Its blocks are freed by the task that writes to them, once it has stopped: freed any
        earlier, they could get another request's tokens and then this one's late bytes.
        """
        if task := self._receiving.get(key):
            return task.cancel()
        self._cancelled.append(key)
        return False

    async def _take(
        self, connection: Connection, memory: OwnMemory | None, reserve: Reserve
    ) -> None:
        """One hand-over. Whatever goes wrong, its blocks are free when this returns."""
        job = reserve.job
        key = (job.id, job.epoch)
        if reserve.checksums and not intact(reserve):
            raise ProtocolError("a reservation was damaged on its way")
        if not same_model(reserve.fingerprint, self._fingerprint) or job.prompt.ids is None:
            raise HandoffFailed("the two workers do not run the same model and tokenizer")
        if key in self._cancelled:  # the router's word came sooner than the prefill worker's
            raise HandoffFailed("the request was cancelled")
        task = asyncio.current_task()
        assert task, "runs in a task"
        self._receiving[key] = task
        # Nothing is to come before we answer, but the end of the connection may, while we wait.
        first = asyncio.create_task(connection.receive())
        resumed = False
        try:
            kind = common(reserve.checksums)
            codecs = known() if kind else ()
            sequence = await self._grant(reserve, first)
            await connection.send(Reserved(*key, kind, codecs, memory.place if memory else None))
            arrival = Arrival(key, self._cache, sequence.blocks, len(sequence.tokens), kind)
            async with asyncio.timeout(reserve.lease_s):
                commit = await self._receive(connection, memory, first, arrival)
            self.bytes_received += arrival.bytes_received
            self.damaged += arrival.damaged
            del self._receiving[key]  # nothing is written any more: a cancel is the engine's now
            resumed = await self._loop.resume(key, commit.firsts, arrival.generation)
        finally:
            self._receiving.pop(key, None)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            if not resumed:
                self._loop.release(key)
        if not resumed:
            raise HandoffFailed("the request was cancelled, or its KV cache lost")
        await connection.send(Committed(*key, arrival.seconds))

    async def _grant(self, reserve: Reserve, first: asyncio.Task[tuple[Wire, int]]) -> Sequence:
        """Wait for blocks, for as long as the prefill worker is there."""
        ids = reserve.job.prompt.ids
        assert ids is not None, "checked"
        granting = asyncio.create_task(self._loop.reserve(reserve.job, ids))
        try:
            await asyncio.wait({granting, first}, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                message, _ = first.result()
                raise ProtocolError(f"{type(message).__name__} before anything was reserved")
            return granting.result()
        finally:
            granting.cancel()
            await asyncio.gather(granting, return_exceptions=True)

    async def _receive(
        self,
        connection: Connection,
        memory: OwnMemory | None,
        first: asyncio.Task[tuple[Wire, int]],
        arrival: Arrival,
    ) -> Commit:
        """Chunks until all KV is there, then the Commit."""
        message, payload = await first
        while True:
            if isinstance(message, KvBlocks):
                await self._chunk(connection, memory, message, payload, arrival)
                if message.slot is not None:
                    await connection.send(Taken(message.slot))
            elif isinstance(message, Commit):
                if arrival.completed(message):
                    return message
                await connection.send(Again(*arrival.key, tuple(arrival.missing())))
            else:
                raise ProtocolError(f"{type(message).__name__} in the middle of a hand-over")
            message, payload = await connection.receive()

    async def _chunk(
        self,
        connection: Connection,
        memory: OwnMemory | None,
        message: KvBlocks,
        payload: int,
        arrival: Arrival,
    ) -> None:
        """Take one chunk, and its share of the time that it kept the link busy.

        Its head has come just before it, so this is the link's time and not the sender's. What
        arrives from that host beside it has a part of the same link.
        """
        host, begun = connection.remote[0], time.perf_counter()
        self._busy[host] += 1
        beside = self._busy[host]
        try:
            await arrival.take(connection, memory, message, payload)
        finally:
            beside = max(beside, self._busy[host])
            self._busy[host] -= 1
            if not self._busy[host]:
                del self._busy[host]
        arrival.seconds += (time.perf_counter() - begun) / beside
