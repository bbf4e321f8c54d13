"""The KV of one prompt as it comes in: chunks are checked, and converted where need be."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import numpy as np

from kernels.kv_rows import KV_TYPES
from scheduler.errors import ProtocolError
from workers.kv_cache import KvPiece
from workers.kv_memory import SLOTS
from workers.kv_pack import RAW, from_floats, known, raw_bytes, unpack
from workers.kv_wire import Checksum, intact, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from scheduler.messages import Commit, KvBlocks, KvPart
    from scheduler.transport import Connection
    from workers.engine import Key
    from workers.kv_cache import KvCache
    from workers.kv_memory import OwnMemory

logger = logging.getLogger(__name__)
_TABLES = 1024  # tokens whose bytes a codec's tables may take


class Arrival:
    """The KV of one prompt as it comes: what of it is here, and whole."""

    def __init__(self, key: Key, cache: KvCache, blocks: list[int], tokens: int, kind: str) -> None:
        self.key = key
        self.bytes_received = 0
        self.damaged = 0  # chunks
        self.seconds = 0.0  # that its chunks were on the link
        self.generation = cache.generation
        self._cache = cache
        self._blocks = blocks
        self._kind = kind  # of the checksums; empty: the sender knows none
        self._whole = np.zeros((cache.layers, tokens), bool)

    async def take(
        self, connection: Connection, memory: OwnMemory | None, message: KvBlocks, payload: int
    ) -> None:
        """Receive one chunk into its place. A damaged one is as good as none.

        Raises ProtocolError if the sender cannot be asked again, HandoffFailed if ours is lost.
        """
        if reason := self._objection(message, payload):
            if not self._kind:
                raise ProtocolError(reason)
            self.damaged += 1
            return  # its payload is skipped
        layers = range(message.first_layer, message.first_layer + message.layers)
        tokens = range(message.first_token, message.first_token + message.tokens)
        place = self._whole[layers.start : layers.stop, tokens.start : tokens.stop]
        place[:] = False
        piece = KvPiece(self._blocks, tokens, layers, self.generation)
        room = self._cache.room(piece)
        if message.codec == RAW and message.dtype == self._cache.dtype:
            whole = await self._fetch(connection, memory, message, room)
        else:
            size = raw_bytes(message) if message.codec == RAW else payload
            whole = await self._convert(connection, memory, message, size, room)
        if whole:
            await self._cache.keep(piece, room)
        place[:] = whole
        self.damaged += not whole

    async def _fetch(
        self,
        connection: Connection,
        memory: OwnMemory | None,
        message: KvBlocks,
        views: list[memoryview],
    ) -> bool:
        """Take a chunk's bytes; whether they are what was sent."""
        checksum = Checksum(self._kind, message)
        if memory and message.slot is not None:
            memory.read(message.slot, views, checksum.see)
        else:
            await connection.receive_into(views)
            for view in views:
                checksum.see(view)
        self.bytes_received += sum(view.nbytes for view in views)
        return not self._kind or checksum.value == message.checksum

    async def _convert(
        self,
        connection: Connection,
        memory: OwnMemory | None,
        message: KvBlocks,
        size: int,
        views: list[memoryview],
    ) -> bool:
        """The same for bytes that are not as the cache keeps them."""
        arrived = np.empty(size, np.uint8)
        if not await self._fetch(connection, memory, message, [arrived.data]):
            return False
        try:
            ours = await asyncio.to_thread(self._ours, arrived, message)
        except ValueError as error:
            logger.warning("KV of job %s: %s", message.id, error)
            return False
        for view in views:
            view[:] = ours[: view.nbytes]
            ours = ours[view.nbytes :]
        return True

    def _ours(self, arrived: np.ndarray[Any, Any], message: KvBlocks) -> memoryview:
        values = unpack(arrived, message)
        return from_floats(values, self._cache.dtype, self._cache.head_dim).data

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

    def _objection(self, message: KvBlocks, payload: int) -> str | None:
        """Why this chunk has no place here, or None."""
        cache, (layers, tokens) = self._cache, self._whole.shape
        if (message.id, message.epoch) != self.key:
            return f"KV of job {message.id} where {self.key[0]} was reserved"
        ours = (cache.kv_heads, cache.head_dim)
        theirs = (message.kv_heads, message.head_dim)
        if theirs != ours:
            return f"KV of {theirs} where {ours} was reserved"
        if message.codec not in known() or message.dtype not in KV_TYPES:
            return f"KV of {message.dtype} packed by {message.codec}"
        if message.codec != RAW and payload > 8 * cache.numbers * message.layers * (
            message.tokens + _TABLES
        ):
            return f"{payload} bytes of {message.tokens} tokens"
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
