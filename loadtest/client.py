"""Requests under way: a raw asyncio protocol, one stamp per read, connections used again."""

from __future__ import annotations

import asyncio
import ssl
from time import monotonic
from typing import TYPE_CHECKING, cast

import msgspec

from loadtest.api import Endpoint, Usage, decode_chunk, error_text
from loadtest.errors import WireError
from loadtest.wire import Events, Response

if TYPE_CHECKING:
    from collections.abc import Callable

_BODY_LIMIT = 64 * 1024 * 1024


class Exchange:
    """One request and what came back, in seconds of `time.monotonic()`.

    `done(exchange)` is called exactly once, when the answer is whole or has failed.
    """

    __slots__ = (
        "_body",
        "_done",
        "_events",
        "_finished",
        "_keep_text",
        "coalesced",
        "connection",
        "detail",
        "end",
        "error",
        "payload",
        "pieces",
        "sent",
        "stamps",
        "status",
        "usage",
    )

    def __init__(
        self, payload: bytes, done: Callable[[Exchange], None], *, keep_text: bool = False
    ) -> None:
        self.payload = payload
        self.sent = 0.0
        self.end = 0.0
        self.stamps: list[float] = []  # of each chunk that carried text
        self.coalesced = 0
        self.pieces: list[str] = []
        self.usage: Usage | None = None
        self.status = 0
        self.error: str | None = None
        self.detail = ""
        self.connection: Connection | None = None
        self._done = done
        self._keep_text = keep_text
        self._events: Events | None = None
        self._finished = False
        self._body = b""  # of an answer that is no stream

    @property
    def body(self) -> bytes:
        """An answer that is no stream."""
        return self._body

    def begin(self, response: Response) -> None:
        self.status = response.status
        if response.headers.get(b"content-type", b"").lower().startswith(b"text/event-stream"):
            self._events = Events()

    def receive(self, body: bytes, now: float) -> None:
        if self._events is None:
            self._body += body
            if len(self._body) > _BODY_LIMIT:
                raise WireError(f"an answer longer than {_BODY_LIMIT} bytes")
            return
        chunks_before = len(self.stamps)
        for event in self._events.feed(body):
            if event == b"[DONE]":
                self._finished = True
            else:
                self._take(event, now)
        if len(self.stamps) - chunks_before > 1:
            self.coalesced += len(self.stamps) - chunks_before - 1

    def _take(self, event: bytes, now: float) -> None:
        chunk = decode_chunk(event)
        if said := chunk.said:
            self.stamps.append(now)
            if self._keep_text:
                self.pieces.append(said)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.finished:
            self._finished = True
        if chunk.error is not None:
            self.error = "stream_error"
            self.detail = error_text(event)

    def complete(self, now: float) -> None:
        """The response's last byte is here."""
        if self.status != 200:
            self.fail(f"http_{self.status}", error_text(self._body), now)
            return
        if self._events is None:
            try:
                self._take(self._body, now)
            except msgspec.DecodeError as error:
                self.error, self.detail = "protocol", str(error)
        if self.error is None and not self._finished:
            self.error, self.detail = "cut", "the stream ended without finish_reason or [DONE]"
        elif self.error is None and not self.stamps:
            self.error, self.detail = "empty", "an answer without any text"
        self._close(now)

    def fail(self, kind: str, detail: str, now: float) -> None:
        self.error, self.detail = kind, detail
        self._close(now)

    def _close(self, now: float) -> None:
        self.end = now
        self.connection = None
        self._done(self)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._response = Response()
        self.used = False  # it has carried a request before the present one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, exchange: Exchange) -> None:
        assert self._transport is not None, "connected before it is handed out"
        self._exchange = exchange
        exchange.connection = self
        self._response = Response()
        self._transport.write(exchange.payload)

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        exchange, response = self._exchange, self._response
        if exchange is None:  # it speaks out of turn
            self.abort()
            return
        try:
            body = response.feed(data)
            if not exchange.status and response.status:
                exchange.begin(response)
            if body:
                exchange.receive(body, now)
            if response.complete:
                self._finish(exchange, now)
        except (WireError, msgspec.DecodeError) as error:
            self._fail(exchange, "protocol", str(error), now)

    def connection_lost(self, exc: Exception | None) -> None:
        now = monotonic()
        self._client.forget(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        self._response.close()
        if self._response.complete:
            exchange.complete(now)
        elif self.used and not self._response.status:
            self._client.send_again(exchange)  # an idle connection that the server had closed
        else:
            exchange.fail("cut", str(exc or "the endpoint closed the connection"), now)

    def abort(self) -> None:
        """Leave at once; the request that it carries is the caller's to end."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, exchange: Exchange, now: float) -> None:
        self._exchange = None
        self.used = True
        if self._response.keep_alive:
            self._client.keep(self)
        else:
            self.abort()
        exchange.complete(now)

    def _fail(self, exchange: Exchange, kind: str, detail: str, now: float) -> None:
        self.abort()
        exchange.fail(kind, detail, now)


class Client:
    """Connections to one endpoint: as many as there are requests under way, the idle used again.

    There is no limit on them, since a limit would queue requests where nobody sees it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: list[Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._tls = _tls(endpoint) if endpoint.tls else None

    def send(self, exchange: Exchange) -> None:
        exchange.sent = monotonic()
        if self._idle:
            self._idle.pop().send(exchange)
        else:
            self._connect(exchange)

    def send_again(self, exchange: Exchange) -> None:
        """On a new connection; the stamp of the first sending stays."""
        self._connect(exchange)

    def cancel(self, exchange: Exchange, kind: str, detail: str) -> None:
        """End a request now by closing its connection; does nothing to one that has ended."""
        if exchange.end:
            return
        if exchange.connection is not None:
            exchange.connection.abort()
        exchange.fail(kind, detail, monotonic())

    def keep(self, connection: Connection) -> None:
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    async def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def _connect(self, exchange: Exchange) -> None:
        task = asyncio.get_running_loop().create_task(self._open(exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _open(self, exchange: Exchange) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self),
                self._endpoint.host,
                self._endpoint.port,
                ssl=self._tls,
            )
        except OSError as error:
            if not exchange.end:
                exchange.fail("connect", str(error), monotonic())
            return
        if exchange.end:  # cancelled meanwhile
            connection.abort()
        else:
            connection.send(exchange)


def _tls(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if endpoint.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def fetch(endpoint: Endpoint, payload: bytes, timeout: float) -> Exchange:
    """One request by itself, its text kept: for what is asked before and after a run."""
    client = Client(endpoint)
    done: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()
    exchange = Exchange(payload, done.set_result, keep_text=True)
    client.send(exchange)
    try:
        return await asyncio.wait_for(asyncio.shield(done), timeout)
    except TimeoutError:
        client.cancel(exchange, "timeout", f"no answer within {timeout:g} s")
        return done.result()
    finally:
        await client.close()
