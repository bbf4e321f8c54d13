"""Responses that are put together here as bytes, and written at once.

aiohttp reads requests and keeps connections. Its own way to write (headers as multidicts, signals,
a writer for each response) takes a third of the CPU time that it needs for a request.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

if TYPE_CHECKING:
    from collections.abc import Iterable

# Set on every request before a handler sees it.
REQUEST_ID = web.RequestKey("request_id", str)

_BARE = (204, 304)  # these have no body, and say nothing of its length


class Written:
    """As much of a response as aiohttp's server asks of one: it keeps or ends the connection.

    Whoever makes it writes it.
    """

    def __init__(self, request: web.BaseRequest, status: int, *, framed: bool = True) -> None:
        """`framed`: a client can tell where the body ends without the end of the connection."""
        self.status = status
        self.keep_alive = framed and request.keep_alive
        self._newest = request.version >= HttpVersion11
        self._id = request[REQUEST_ID]

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: whoever made it has written it."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing, likewise."""

    def head(self, fields: bytes) -> bytes:
        """Status line and headers: `fields`, each with its end of line, and what all have."""
        if self._newest:
            connection = b"" if self.keep_alive else b"Connection: close\r\n"
        else:
            connection = b"Connection: keep-alive\r\n" if self.keep_alive else b""
        common = (self._id.encode(), _date(int(time.time())), connection)
        line = b"HTTP/1.%d %d %b\r\n" % (self._newest, self.status, _phrase(self.status))
        return line + fields + b"X-Request-Id: %b\r\nDate: %b\r\n%b\r\n" % common


class Whole(Written):
    """An answer that is complete: one write when the handler has returned it."""

    def __init__(
        self, request: web.BaseRequest, body: bytes, status: int = 200, fields: bytes | None = None
    ) -> None:
        super().__init__(request, status)
        self._bytes = body
        self._fields = b"Content-Type: application/json\r\n" if fields is None else fields

    async def prepare(self, request: web.BaseRequest) -> None:
        """Returns when nearly all has left: a client that does not read gets no further answer.

        Raises ConnectionError if the client has left.
        """
        bare = self.status in _BARE
        length = b"" if bare else b"Content-Length: %d\r\n" % len(self._bytes)
        body = b"" if bare or request.method == "HEAD" else self._bytes
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self.head(self._fields + length) + body)
        if request.protocol.writing_paused:
            await request.writer.drain()


def fields_of(headers: Iterable[tuple[str, str]]) -> bytes:
    """Headers, none of which holds an end of line, for `head`."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


@lru_cache
def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:  # an endpoint's own
        return b""
