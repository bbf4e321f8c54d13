"""A response of server-sent events, written in as few packets as its reader can tell apart."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Set on every request before a handler sees it.
REQUEST_ID = web.RequestKey("request_id", str)

_SSE_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
APART_S = 0.004  # between two packets of one stream: none of its readers reads faster
_PACKET_MOST = 1 << 14  # bytes


class ClientLeft(Exception):
    """The connection is gone, or the client has stopped reading."""


class Sweep:
    """Streams that have written a moment ago: what comes meanwhile leaves APART_S later.

    One timer for all of them, for what events cost is packets and wake-ups.
    """

    def __init__(self) -> None:
        self._streams: list[Events] = []

    def add(self, events: Events) -> None:
        if not self._streams:
            asyncio.get_running_loop().call_later(APART_S, self._write)
        self._streams.append(events)

    def _write(self) -> None:
        streams, self._streams = self._streams, []
        for events in streams:
            events.write()


class Head(web.StreamResponse):
    """Its headers leave with the first bytes of the body."""

    _send_headers_immediately = False


class Events:
    """One response of server-sent events. A slow client is waited for, `stall_s` at most.

    Only the first, with the headers, and the last go through aiohttp: the others are many.
    """

    def __init__(self, request: web.Request, sweep: Sweep, stall_s: float) -> None:
        self.response = Head(headers=_SSE_HEADERS)
        if request.version >= HttpVersion11:
            self.response.enable_chunked_encoding()
        self.begun = False
        self._request = request
        self._sweep = sweep
        self._stall_s = stall_s
        self._clock = asyncio.get_running_loop().time
        self._waiting = b""
        self._swept = False  # in the next sweep
        self._first = True
        self._wrote = 0.0  # when the latest packet left

    @property
    def request_id(self) -> str:
        return self._request[REQUEST_ID]

    async def begin(self) -> None:
        """From here on an error is an event. Raises ClientLeft."""
        self.begun = True
        async with self._patience():
            await self.response.prepare(self._request)

    def add(self, event: bytes, *, last: bool) -> bool:
        """Send an event soon; the `last` one of a choice leaves with what follows it.

        False: there is no room; `drain` before the next one.
        """
        self._waiting += event
        if last or (self._swept and len(self._waiting) < _PACKET_MOST):
            return True
        if self._first or self._swept or self._request.protocol.writing_paused:
            return False
        if self._clock() - self._wrote >= APART_S:
            self.write()
        else:
            self._swept = True
            self._sweep.add(self)
        return True

    def write(self) -> None:
        """What waits, in one packet, without waiting for room."""
        events, transport = self._take(), self._request.transport
        if events and transport is not None and not transport.is_closing():
            chunk = b"%x\r\n%b\r\n" % (len(events), events)
            transport.write(chunk if self.response.chunked else events)

    async def drain(self) -> None:
        """Returns when the client's socket has room for more. Raises ClientLeft."""
        self._first = False
        async with self._patience():
            await self.response.write(self._take())
            await self._request.writer.drain()

    async def end(self, event: bytes) -> None:
        """Nothing follows this one. Raises ClientLeft."""
        async with self._patience():
            await self.response.write_eof(self._take() + event)

    def close(self) -> None:
        """Write no more."""
        self._take()

    def _take(self) -> bytes:
        self._swept, self._wrote = False, self._clock()
        events, self._waiting = self._waiting, b""
        return events

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._stall_s):
                yield
        except ConnectionError:
            raise ClientLeft from None
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()  # or aiohttp would wait to send the rest
            raise ClientLeft from None
