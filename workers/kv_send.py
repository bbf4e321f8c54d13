"""The prefill worker's end of a KV hand-over: layers leave as they are computed.

    prefill worker                                decode worker
    Reserve(job)            ───────────────────►  waits until blocks are free
                            ◄───────────────────  Reserved
    KvBlocks + raw bytes    ───────────────────►  received into the reserved blocks
    … as often as layers of the prompt are finished, while the next ones are computed …
    Commit(first tokens)    ───────────────────►  goes on decoding
                            ◄───────────────────  Committed, or Again(what is missing or damaged)

One connection carries one hand-over at a time, so its end is the end of the lease: whichever side
dies, the other frees its blocks at once. Idle connections are kept for the next hand-over.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from scheduler.errors import HandoffFailed, ProtocolError
from scheduler.messages import (
    Address,
    Again,
    Commit,
    Committed,
    KvBlocks,
    KvPart,
    Refused,
    Reserve,
    Reserved,
)
from scheduler.transport import dial
from workers.host_memory import host
from workers.kv_cache import KvPiece
from workers.kv_link import Link
from workers.kv_pack import LEAST_TOKENS, RAW, choose, pack
from workers.kv_wire import CHECKSUMS, Limits, chunks, parts_of, seal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator
    from typing import Any

    from scheduler.messages import Peer
    from scheduler.request import Job
    from workers.held import Held, Ready
    from workers.kv_cache import KvCache

KEEP_S = 2.0  # an idle link, for the next hand-over to this peer
ROUNDS = 3  # commits before a peer that misses something each time is given up


class Lease:
    """Blocks held at the decode worker for one job."""

    def __init__(
        self, link: Link, job: Job, cache: KvCache, kind: str, codec: str, limits: Limits
    ) -> None:
        self.made: float | None = None  # numbers per second that prefill made
        self.committed = False
        self.bytes_early = 0  # sent before the prompt was computed
        self.kv_bytes = 0  # of the whole prompt, before any codec
        self.link_s = 0.0  # that its KV kept the link busy, as the decode worker saw it
        self._link = link
        self._before = link.bytes_sent
        self._job = job
        self._cache = cache
        self._kind = kind  # of the checksums; empty: the peer takes whole layers only
        self._codec = codec
        self._limits = limits
        self._begun: float | None = None
        self._sent = [0] * cache.layers  # tokens of each layer
        self._ready: Ready | None = None
        self._changed = asyncio.Event()

    @property
    def bytes_sent(self) -> int:
        return self._link.bytes_sent - self._before

    def watch(self, ready: Ready) -> None:
        """More of the prompt is computed."""
        self._ready = ready
        self._begun = self._begun or time.perf_counter()
        self._changed.set()

    async def push(self, computing: Coroutine[Any, Any, Held]) -> Held:
        """Send the KV while it is computed and commit it: the decode worker continues the job.

        If no choice goes on, nothing is committed.
        """
        prefill = asyncio.create_task(computing)
        prefill.add_done_callback(lambda _: self._changed.set())
        try:
            while not prefill.done():
                await self._changed.wait()
                self._changed.clear()
                if self._kind and self._ready and not prefill.done():
                    await self._send_ready(self._ready)
            held = prefill.result()
            self.bytes_early = self.bytes_sent
            if self._begun:
                numbers = 2 * held.tokens * self._cache.layers * self._cache.numbers
                self.made = numbers / (time.perf_counter() - self._begun)
            if held.firsts:
                self.kv_bytes = held.tokens * self._cache.layers * self._cache.token_bytes
                await self._finish(held)
            return held
        finally:
            prefill.cancel()
            await asyncio.gather(prefill, return_exceptions=True)

    async def _send_ready(self, ready: Ready) -> None:
        """Send what is computed and was not sent, if it is worth a frame."""
        parts = list(self._unsent(ready.tokens, ready.end, ready.layers))
        width = self._cache.token_bytes
        if sum(part.layers * part.tokens * width for part in parts) < self._limits.early_bytes:
            return
        for part in parts:
            for chunk in chunks(part, width):
                if not await self._send(chunk, ready):
                    return
                for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
                    self._sent[layer] = chunk.first_token + chunk.tokens

    def _unsent(self, tokens: int, end: int, layers: int) -> Iterator[KvPart]:
        """Parts of the KV that has `tokens` tokens of every layer, `end` of the first `layers`."""
        spans = [(sent, end if layer < layers else tokens) for layer, sent in enumerate(self._sent)]
        return parts_of(spans)

    async def _finish(self, held: Held) -> None:
        """Send the rest and commit; once more what did not arrive."""
        commit = seal(Commit(self._job.id, self._job.epoch, held.firsts))
        parts = tuple(self._unsent(held.tokens, held.tokens, 0))
        for _ in range(ROUNDS):
            for part in parts:
                for chunk in chunks(part, self._cache.token_bytes) if self._kind else (part,):
                    await self._send(chunk, held)
            async with asyncio.timeout(self._limits.push_s):
                await self._link.connection.send(commit)
                answer = await self._link.answer()
            if not isinstance(answer, Again):
                break
            parts = answer.parts
        if not isinstance(answer, Committed):
            reason = answer.reason if isinstance(answer, Refused) else type(answer).__name__
            raise ProtocolError(f"the answer to a commit was: {reason}")
        self.committed, self.link_s = True, answer.link_s

    async def _send(self, part: KvPart, source: Held | Ready) -> bool:
        """Send one chunk; False if its source is current no more, and it was not sent.

        Raises HandoffFailed if it is lost.
        """
        cache = self._cache
        message = KvBlocks(
            id=self._job.id,
            epoch=self._job.epoch,
            first_layer=part.first_layer,
            layers=part.layers,
            first_token=part.first_token,
            tokens=part.tokens,
            kv_heads=cache.kv_heads,
            head_dim=cache.head_dim,
            dtype=cache.dtype,
            codec=RAW,
        )
        layers = range(part.first_layer, part.first_layer + part.layers)
        tokens = range(part.first_token, part.first_token + part.tokens)
        async with asyncio.timeout(self._limits.push_s):
            views = await cache.taken(KvPiece(source.blocks, tokens, layers, source.generation))
            if self._codec != RAW and part.tokens >= LEAST_TOKENS:
                message = msgspec.structs.replace(message, codec=self._codec)
                taken = np.frombuffer(b"".join(views), np.uint8)
                packed = await asyncio.to_thread(pack, self._codec, taken, message)
                views = [packed.data]
            return await self._link.send(message, views, self._kind, source.current)


class KvSender:
    """Makes leases at decode workers, and keeps the connections."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        cache: KvCache,
        secret: bytes,
        limits: Limits = Limits(),  # noqa: B008  # frozen
    ) -> None:
        self.bytes_sent = 0
        self._name = name
        self._fingerprint = fingerprint
        self._cache = cache
        self._secret = secret
        self._limits = limits
        self._idle: dict[Address, dict[Link, asyncio.TimerHandle]] = {}  # until it is closed
        self._made: float | None = None  # numbers per second, by the last prompt
        self._rates: dict[tuple[str, int], float] = {}  # bytes per second to each peer

    @asynccontextmanager
    async def reserve(self, job: Job, peer: Peer) -> AsyncIterator[Lease]:
        """Hold blocks at the peer while the context is open. Raises HandoffFailed, inside too."""
        link: Link | None = None
        try:
            link = await self._connect(peer.address)
            lease = await self._ask(link, job)
            try:
                yield lease
            finally:  # what was sent was sent, also to a request that is over before its commit is
                self.bytes_sent += lease.bytes_sent
        except (OSError, TimeoutError, ProtocolError) as error:
            _close(link)
            raise HandoffFailed(f"{peer.name} did not take the KV cache: {error!r}") from error
        except BaseException:
            _close(link)
            raise
        self._made = lease.made or self._made
        if rate := link.connection.rate:
            self._rates[link.connection.remote] = rate
        if lease.committed:
            self._keep(peer.address, link)
        else:
            link.close()  # with it ends the lease

    def close(self) -> None:
        for address, links in list(self._idle.items()):
            for link in list(links):
                self._take(address, link).close()

    async def _ask(self, link: Link, job: Job) -> Lease:
        limits = self._limits
        place = host() if limits.share else ""
        ask = Reserve(job, self._name, self._fingerprint, limits.lease_s, place, CHECKSUMS)
        await link.connection.send(seal(ask))
        async with asyncio.timeout(limits.reserve_s):
            reserved = await link.connection.expect(Reserved)
        link.share(reserved.memory)
        usable = [codec for codec in limits.codecs if codec in (RAW, *reserved.codecs)] or [RAW]
        rate = None if link.shares else self._rates.get(link.connection.remote)
        codec = choose(usable, self._cache.dtype, rate, self._made)
        return Lease(link, job, self._cache, reserved.checksum, codec, limits)

    async def _connect(self, address: Address) -> Link:
        """A kept link that is still open, else a new one."""
        for link in reversed(list(self._idle.get(address, ()))):
            self._take(address, link)
            if link.connection.alive:
                return link
            link.close()
        return Link(await dial(address.host, address.port, self._secret))

    def _keep(self, address: Address, link: Link) -> None:
        """A link that nobody needs for a while is closed, or one would be left of each burst."""
        loop = asyncio.get_running_loop()
        links = self._idle.setdefault(address, {})
        links[link] = loop.call_later(KEEP_S, lambda: self._take(address, link).close())

    def _take(self, address: Address, link: Link) -> Link:
        links = self._idle[address]
        links.pop(link).cancel()
        if not links:
            del self._idle[address]
        return link


def _close(link: Link | None) -> None:
    if link:
        link.close()
