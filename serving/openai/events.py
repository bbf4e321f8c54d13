"""A response of server-sent events, written in as few packets as its reader can tell apart."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11

from serving.direct import REQUEST_ID, Written

if TYPE_CHECKING:
    from aiohttp import web

# The last one: nginx would hold events back.
_FIELDS = b"Content-Type: text/event-stream\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
APART_S = 0.008  # between two packets of one stream: no screen shows more of them
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


class Events:
    """One response of server-sent events. A slow client is waited for, `stall_s` at most.

    Its headers leave with the first event.
    """

    def __init__(self, request: web.BaseRequest, sweep: Sweep, stall_s: float) -> None:
        self._chunked = request.version >= HttpVersion11
        self.response = Written(request, 200, framed=self._chunked)
        self.begun = False
        self._request = request
        self._sweep = sweep
        self._stall_s = stall_s
        self._clock = asyncio.get_running_loop().time
        self._head = b""
        self._waiting = b""
        self._swept = False  # in the next sweep
        self._wrote = 0.0  # when the latest packet left

    @property
    def request_id(self) -> str:
        return self._request[REQUEST_ID]

    def begin(self) -> None:
        """From here on an error is an event."""
        self.begun = True
        self._head = self.response.head(_FIELDS + _CHUNKED if self._chunked else _FIELDS)

    def add(self, event: bytes, *, last: bool) -> bool:
        """Send an event soon; the `last` one of a choice leaves with what follows it.

        False: there is no room; `drain` before the next one.
        """
        self._waiting += event
        if last or (self._swept and len(self._waiting) < _PACKET_MOST):
            return True
        if self._swept or self._request.protocol.writing_paused:
            return False
        if self._clock() - self._wrote >= APART_S:
            self.write()
        else:
            self._swept = True
            self._sweep.add(self)
        return True

    def write(self, end: bytes = b"") -> None:
        """What waits, and `end`, in one packet, without waiting for room."""
        events = self._take()
        if self._chunked and events:
            events = b"%x\r\n%b\r\n" % (len(events), events)
        packet, transport = self._head + events + end, self._request.transport
        if packet and transport is not None and not transport.is_closing():
            self._head = b""
            transport.write(packet)

    async def drain(self) -> None:
        """Returns when the client's socket has room for more. Raises ClientLeft."""
        self.write()
        await self._room()

    async def end(self, event: bytes) -> None:
        """Nothing follows this one. Raises ClientLeft."""
        self._waiting += event
        self.write(b"0\r\n\r\n" if self._chunked else b"")
        await self._room()

    def close(self) -> None:
        """Write no more."""
        self._take()

    def _take(self) -> bytes:
        self._swept, self._wrote = False, self._clock()
        events, self._waiting = self._waiting, b""
        return events

    async def _room(self) -> None:
        """Wait until what was written has nearly left. Raises ClientLeft."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientLeft
        if not self._request.protocol.writing_paused:
            return
        try:
            async with asyncio.timeout(self._stall_s):
                await self._request.writer.drain()
        except ConnectionError:
            raise ClientLeft from None
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()  # or aiohttp would wait to send the rest
            raise ClientLeft from None
