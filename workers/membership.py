"""A worker's place at one router: join, report, hear; and join again whenever the router is lost.

A worker has one of these for each router that it serves. What is said waits in a bounded outbox,
so a router that does not listen holds up neither the engine nor the other routers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from scheduler.errors import ProtocolError, SetupError
from scheduler.messages import Address, Join, Joined, Load, Wire
from scheduler.transport import Connection, dial

if TYPE_CHECKING:
    from collections.abc import Awaitable

logger = logging.getLogger(__name__)

REJOIN_FIRST_S, REJOIN_MAX_S = 0.1, 2.0
JOIN_S = 10.0  # from our introduction to the router's welcome
OUTBOX = 65536  # words that wait; a router that lets more gather is lost


class Host(Protocol):
    """The worker behind its memberships."""

    def introduction(self, host: str) -> Join:
        """Who this worker is; `host` is its address as this router sees it."""
        ...

    def load(self, membership: Membership) -> Load:
        """The next heartbeat."""
        ...

    def hear(self, membership: Membership, message: Wire) -> None:
        """Obey one word of the router. Raises ProtocolError."""
        ...

    def left(self, membership: Membership) -> Awaitable[None]:
        """Free what this router's requests hold; its clients are served elsewhere."""
        ...


class Membership:
    """`router` is the router's id while this worker is a member there, None otherwise."""

    def __init__(self, address: Address, secret: bytes, host: Host) -> None:
        self.router: str | None = None
        self._address = address
        self._secret = secret
        self._host = host
        self._connection: Connection | None = None
        self._outbox: asyncio.Queue[Wire] = asyncio.Queue()
        self._known = False  # it has taken us in before

    async def stay(self) -> None:
        """Until cancelled. Raises SetupError if the router never took us in and refuses to."""
        pause = REJOIN_FIRST_S
        while True:
            try:
                await self._attend()
                pause = REJOIN_FIRST_S
            except ProtocolError as error:
                if not self._known:
                    raise SetupError(f"the router refused this worker: {error}") from error
                logger.warning("the router at %s: %s; trying again", self._address, error)
            except (OSError, TimeoutError) as error:
                logger.warning("no router at %s (%r); trying again", self._address, error)
            # Many workers that lose one router must not come back in one instant.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, REJOIN_MAX_S)

    def tell(self, message: Wire) -> None:
        """Say it in its turn; if the router is lost, there is nobody to tell."""
        if self._connection is None:
            return
        if self._outbox.qsize() >= OUTBOX:
            logger.warning("the router at %s does not listen", self._address)
            self._connection.close()
            return
        self._outbox.put_nowait(message)

    async def flush(self) -> None:
        """Wait until all is said, or the router lost."""
        await self._outbox.join()

    async def _attend(self) -> None:
        """One membership, until the router is lost."""
        connection = await dial(self._address.host, self._address.port, self._secret)
        helpers: list[asyncio.Task[None]] = []
        try:
            await connection.send(self._host.introduction(connection.local[0]))
            async with asyncio.timeout(JOIN_S):
                joined = await connection.expect(Joined)
            logger.info("joined the router at %s:%s", *connection.remote)
            self.router, self._connection, self._known = joined.router, connection, True
            helpers.append(asyncio.create_task(self._write(connection)))
            helpers.append(asyncio.create_task(self._beat(joined.heartbeat_s)))
            await self._hear(connection)
        except ConnectionError as error:
            if self.router is None:
                raise
            logger.warning("the router is lost: %s", error)
        finally:
            connection.close()
            self._connection = None
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            self._forget()
            await self._host.left(self)
            self.router = None

    async def _hear(self, connection: Connection) -> None:
        while True:
            message, _ = await connection.receive()
            self._host.hear(self, message)

    async def _write(self, connection: Connection) -> None:
        with suppress(ConnectionError):
            while True:
                words = [await self._outbox.get()]
                while not self._outbox.empty():
                    words.append(self._outbox.get_nowait())
                try:
                    await connection.send_all(words)
                finally:
                    for _ in words:
                        self._outbox.task_done()

    async def _beat(self, every_s: float) -> None:
        while True:
            self.tell(self._host.load(self))
            await asyncio.sleep(every_s)

    def _forget(self) -> None:
        """What was not said is said to nobody."""
        while not self._outbox.empty():
            self._outbox.get_nowait()
            self._outbox.task_done()
