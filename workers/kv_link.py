"""A prefill worker's connection to one decode worker, with the memory that the two may share."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from scheduler.messages import KvBlocks, Taken
from workers.kv_memory import PeerMemory
from workers.kv_wire import Checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.messages import KvMemory, Wire
    from scheduler.transport import Connection

logger = logging.getLogger(__name__)


class Link:
    """Chunks go by way of shared memory where it is, else over the connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.bytes_sent = 0
        self._memory: PeerMemory | None = None

    @property
    def shares(self) -> bool:
        """Whether it leads through memory."""
        return self._memory is not None

    def share(self, place: KvMemory | None) -> None:
        """Use the memory that the decode worker offers, if we can."""
        if self._memory and self._memory.place == place:
            return
        self._leave()
        if place:
            try:
                self._memory = PeerMemory(place)
            except (OSError, ValueError) as error:
                logger.info("no memory shared with %s: %s", self.connection.remote, error)

    async def send(
        self,
        message: KvBlocks,
        payload: Sequence[memoryview],
        kind: str,
        current: Callable[[], bool],
    ) -> bool:
        """Send one chunk with its checksum; False if it was not `current` once that was computed.

        What is overwritten later than that, the checksum shows.
        """
        size = sum(view.nbytes for view in payload)
        slot = await self._slot(size)
        message = msgspec.structs.replace(message, slot=slot)
        checksum = Checksum(kind, message)
        if self._memory and slot is not None:
            self._memory.write(slot, payload, checksum.see)
            payload = ()
        for view in payload:
            checksum.see(view)
        if not current():
            self._free(slot)
            return False
        value = checksum.value if kind else None
        await self.connection.send(msgspec.structs.replace(message, checksum=value), payload)
        self.bytes_sent += size
        return True

    async def answer(self) -> Wire:
        """The decode worker's next word that is about the hand-over."""
        while isinstance(message := (await self.connection.receive())[0], Taken):
            self._free(message.slot)
        return message

    def close(self) -> None:
        self._leave()
        self.connection.close()

    async def _slot(self, size: int) -> int | None:
        """A free slot for so many bytes, or None where there is no memory for them."""
        if not self._memory or size > self._memory.slot_bytes:
            return None
        while (slot := self._memory.take()) is None:
            self._free((await self.connection.expect(Taken)).slot)
        return slot

    def _free(self, slot: int | None) -> None:
        if self._memory and slot is not None:
            self._memory.give_back(slot)

    def _leave(self) -> None:
        if self._memory:
            self._memory.close()
            self._memory = None
