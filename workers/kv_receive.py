"""The decode worker's end of a KV hand-over: blocks are reserved first, and filled in place."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

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
from workers.kv_memory import SLOTS, OwnMemory, host
from workers.kv_wire import Checksum, common, intact, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scheduler.batching import Sequence
    from scheduler.messages import KvPart, Wire
    from scheduler.transport import Connection
    from workers.engine import Key
    from workers.engine_loop import EngineLoop
    from workers.kv_cache import KvCache

logger = logging.getLogger(__name__)


class Arrival:
    """The KV of one prompt as it comes: what of it is here, and whole."""

    def __init__(self, key: Key, cache: KvCache, blocks: list[int], tokens: int, kind: str) -> None:
        self.key = key
        self.bytes_received = 0
        self.damaged = 0  # chunks
        self._cache = cache
        self._blocks = blocks
        self._kind = kind  # of the checksums; empty: the sender knows none
        self._whole = np.zeros((cache.layers, tokens), bool)

    async def take(
        self, connection: Connection, memory: OwnMemory | None, message: KvBlocks
    ) -> None:
        """Receive one chunk into its place. A damaged one is as good as none.

        Raises ProtocolError if the sender cannot be asked again.
        """
        if reason := self._objection(message):
            if not self._kind:
                raise ProtocolError(reason)
            self.damaged += 1
            return  # its payload is skipped
        layers = range(message.first_layer, message.first_layer + message.layers)
        tokens = range(message.first_token, message.first_token + message.tokens)
        place = self._whole[layers.start : layers.stop, tokens.start : tokens.stop]
        place[:] = False
        views = self._cache.views(self._blocks, tokens, layers)
        checksum = Checksum(self._kind, message)
        if memory and message.slot is not None:
            memory.read(message.slot, views, checksum.see)
        else:
            await connection.receive_into(views)
            for view in views:
                checksum.see(view)
        self.bytes_received += sum(view.nbytes for view in views)
        place[:] = not self._kind or checksum.value == message.checksum
        self.damaged += not place.all()

    def completed(self, commit: Commit) -> bool:
        """Whether this commit is whole, and so is all KV.

        Raises ProtocolError if there is nothing to commit, or the sender cannot be asked again.
        """
        key = (commit.id, commit.epoch)
        if self._kind and not (intact(commit) and key == self.key):
            return False
        whole = bool(self._whole.all())
        if not commit.firsts or not (whole or self._kind):
            raise ProtocolError("a commit without all layers, or without choices")
        return whole

    def missing(self) -> Iterator[KvPart]:
        """What has not arrived whole."""
        return parts_of(_gap(whole) for whole in self._whole)

    def _objection(self, message: KvBlocks) -> str | None:
        """Why this chunk has no place here, or None."""
        cache, (layers, tokens) = self._cache, self._whole.shape
        if (message.id, message.epoch) != self.key:
            return f"KV of job {message.id} where {self.key[0]} was reserved"
        ours = (cache.kv_heads, cache.head_dim, cache.dtype, "raw")
        theirs = (message.kv_heads, message.head_dim, message.dtype, message.codec)
        if theirs != ours:
            return f"KV of {theirs} where {ours} was reserved"
        if not self._kind and (message.first_token, message.tokens) != (0, tokens):
            return f"KV of {message.tokens} tokens where {tokens} were reserved"
        if message.slot not in (None, *range(SLOTS)):
            return f"slot {message.slot} of {SLOTS}"
        last_layer = message.first_layer + message.layers
        last_token = message.first_token + message.tokens
        if not 0 <= message.first_layer <= last_layer <= layers:
            return f"layers up to {last_layer} where there are {layers}"
        if not 0 <= message.first_token <= last_token <= tokens:
            return f"tokens up to {last_token} where {tokens} were reserved"
        return None


def _gap(whole: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[int, int]:
    """The shortest range that covers all that is False."""
    lacking = np.flatnonzero(~whole)
    return (int(lacking[0]), int(lacking[-1]) + 1) if len(lacking) else (0, 0)


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
                    logger.warning("job %s from %s: %s", reserve.job.id, reserve.prefill, error)
                    await connection.send(Refused(str(error) or "the lease ran out"))
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
        if reserve.fingerprint != self._fingerprint or job.prompt.ids is None:
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
            sequence = await self._grant(reserve, first)
            await connection.send(Reserved(*key, kind, memory.place if memory else None))
            arrival = Arrival(key, self._cache, sequence.blocks, len(sequence.tokens), kind)
            async with asyncio.timeout(reserve.lease_s):
                commit = await self._receive(connection, memory, first, arrival)
            self.bytes_received += arrival.bytes_received
            self.damaged += arrival.damaged
            del self._receiving[key]  # nothing is written any more: a cancel is the engine's now
            resumed = await self._loop.resume(key, commit.firsts)
        finally:
            self._receiving.pop(key, None)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            if not resumed:
                self._loop.release(key)
        if not resumed:
            raise HandoffFailed("the request was cancelled")
        await connection.send(Committed(*key))

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
        message, _ = await first
        while True:
            if isinstance(message, KvBlocks):
                await arrival.take(connection, memory, message)
                if message.slot is not None:
                    await connection.send(Taken(message.slot))
            elif isinstance(message, Commit):
                if arrival.completed(message):
                    return message
                await connection.send(Again(*arrival.key, tuple(arrival.missing())))
            else:
                raise ProtocolError(f"{type(message).__name__} in the middle of a hand-over")
            message, _ = await connection.receive()
