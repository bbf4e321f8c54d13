"""Moving a prompt's KV cache from the prefill worker to the decode worker, straight over TCP.

    prefill worker                                decode worker
    Reserve(job)            ───────────────────►  waits until blocks are free
                            ◄───────────────────  Reserved
    … computes the prompt, first token to the client …
    KvBlocks + raw bytes    ───────────────────►  received into the reserved blocks
    Commit(first tokens)    ───────────────────►  goes on decoding
                            ◄───────────────────  Committed

One connection carries one hand-over at a time, so its end is the end of the lease: whichever side
dies, the other frees its blocks at once. Idle connections are kept for the next hand-over.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from scheduler.errors import BadRequest, HandoffFailed, ProtocolError
from scheduler.messages import (
    Address,
    Commit,
    Committed,
    KvBlocks,
    Refused,
    Reserve,
    Reserved,
)
from scheduler.transport import Connection, dial

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scheduler.messages import Peer
    from scheduler.request import Job
    from workers.engine import Held, Key
    from workers.engine_loop import EngineLoop
    from workers.kv_cache import KvCache

logger = logging.getLogger(__name__)

RESERVE_S = 120.0  # a decode pool that is full for longer is better replaced by a replay
LEASE_S = 120.0  # from Reserved to Commit: the prefill of a long prompt on a slow node
PUSH_S = 60.0


class Lease:
    """Blocks held at the decode worker for one job."""

    def __init__(self, connection: Connection, job: Job, cache: KvCache) -> None:
        self.committed = False
        self.bytes_sent = 0
        self._connection = connection
        self._job = job
        self._cache = cache

    async def push(self, held: Held) -> None:
        """Send the KV and commit it; on return the decode worker continues the job."""
        cache = self._cache
        views = cache.views(held.blocks, held.tokens, range(cache.layers))
        announcement = KvBlocks(
            id=self._job.id,
            epoch=self._job.epoch,
            first_layer=0,
            layers=cache.layers,
            tokens=held.tokens,
            kv_heads=cache.kv_heads,
            head_dim=cache.head_dim,
            dtype=cache.dtype,
            codec="raw",
        )
        async with asyncio.timeout(PUSH_S):
            await self._connection.send(announcement, views)
            await self._connection.send(Commit(self._job.id, self._job.epoch, held.firsts))
            await self._connection.expect(Committed)
        self.bytes_sent = sum(view.nbytes for view in views)
        self.committed = True


class KvSender:
    """The prefill worker's side."""

    def __init__(self, name: str, fingerprint: str, cache: KvCache, secret: bytes) -> None:
        self.bytes_sent = 0
        self._name = name
        self._fingerprint = fingerprint
        self._cache = cache
        self._secret = secret
        self._idle: dict[Address, list[Connection]] = {}

    @asynccontextmanager
    async def reserve(self, job: Job, peer: Peer) -> AsyncIterator[Lease]:
        """Hold blocks at the peer while the context is open. Raises HandoffFailed, inside too."""
        connection: Connection | None = None
        try:
            connection = await self._connect(peer.address)
            await connection.send(Reserve(job, self._name, self._fingerprint, LEASE_S))
            async with asyncio.timeout(RESERVE_S):
                await connection.expect(Reserved)
            lease = Lease(connection, job, self._cache)
            yield lease
        except (OSError, TimeoutError, ProtocolError) as error:
            _close(connection)
            raise HandoffFailed(f"{peer.name} did not take the KV cache: {error!r}") from error
        except BaseException:
            _close(connection)
            raise
        self.bytes_sent += lease.bytes_sent
        if lease.committed:
            self._idle.setdefault(peer.address, []).append(connection)
        else:
            connection.close()  # with it ends the lease

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def _connect(self, address: Address) -> Connection:
        """A kept connection that is still open, else a new one."""
        kept = self._idle.get(address, [])
        while kept:
            connection = kept.pop()
            if connection.alive:
                return connection
            connection.close()
        return await dial(address.host, address.port, self._secret)


class KvReceiver:
    """The decode worker's side: `serve` handles one connection from one prefill worker."""

    def __init__(self, fingerprint: str, cache: KvCache, loop: EngineLoop) -> None:
        self.bytes_received = 0
        self._fingerprint = fingerprint
        self._cache = cache
        self._loop = loop
        self._receiving: dict[Key, asyncio.Task[None]] = {}

    async def serve(self, connection: Connection) -> None:
        """Take hand-overs until the connection ends."""
        while True:
            reserve = await connection.expect(Reserve)
            try:
                await self._take(connection, reserve)
            except (HandoffFailed, BadRequest, TimeoutError) as error:
                logger.warning("job %s from %s: %s", reserve.job.id, reserve.prefill, error)
                await connection.send(Refused(str(error) or "the lease ran out"))
                return

    def cancel(self, key: Key) -> bool:
        """Stop receiving a job. False if none is under way.

        Its blocks are freed by the task that writes to them, once it has stopped: freed any
        earlier, they could get another request's tokens and then this one's late bytes.
        """
        task = self._receiving.get(key)
        return task.cancel() if task else False

    async def _take(self, connection: Connection, reserve: Reserve) -> None:
        """One hand-over. Whatever goes wrong, its blocks are free when this returns."""
        job = reserve.job
        key = (job.id, job.epoch)
        if reserve.fingerprint != self._fingerprint or job.prompt.ids is None:
            raise HandoffFailed("the two workers do not run the same model and tokenizer")
        task = asyncio.current_task()
        assert task, "runs in a task"
        self._receiving[key] = task
        resumed = False
        try:
            sequence = await self._loop.reserve(job, job.prompt.ids)
            await connection.send(Reserved(*key))
            async with asyncio.timeout(reserve.lease_s):
                commit = await self._receive(connection, sequence.blocks, len(sequence.tokens))
            del self._receiving[key]  # nothing is written any more: a cancel is the engine's now
            resumed = await self._loop.resume(key, commit.firsts)
        finally:
            self._receiving.pop(key, None)
            if not resumed:
                self._loop.release(key)
        if not resumed:
            raise HandoffFailed("the request was cancelled")
        await connection.send(Committed(*key))

    async def _receive(self, connection: Connection, blocks: list[int], tokens: int) -> Commit:
        """KvBlocks until all layers are there, then the Commit."""
        missing = set(range(self._cache.layers))
        while True:
            message, _ = await connection.receive()
            if isinstance(message, Commit):
                if missing or not message.firsts:
                    raise ProtocolError(f"commit without {sorted(missing) or 'choices'}")
                return message
            if not isinstance(message, KvBlocks):
                raise ProtocolError(f"{type(message).__name__} in the middle of a hand-over")
            self._check(message, tokens)
            layers = range(message.first_layer, message.first_layer + message.layers)
            views = self._cache.views(blocks, tokens, layers)
            await connection.receive_into(views)
            self.bytes_received += sum(view.nbytes for view in views)
            missing -= set(layers)

    def _check(self, message: KvBlocks, tokens: int) -> None:
        cache = self._cache
        ours = (tokens, cache.kv_heads, cache.head_dim, cache.dtype, "raw")
        theirs = (
            message.tokens,
            message.kv_heads,
            message.head_dim,
            message.dtype,
            message.codec,
        )
        fits = 0 <= message.first_layer <= message.first_layer + message.layers <= cache.layers
        if theirs != ours or not fits:
            raise ProtocolError(f"KV of {theirs} where {ours} was reserved")


def _close(connection: Connection | None) -> None:
    if connection:
        connection.close()
