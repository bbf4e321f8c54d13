"""The two generation endpoints: a body in, a whole answer or server-sent events out.

Headers are held until the generator has accepted a request, so a prompt that only the tokenizer
finds too long is still a 400. Whatever ends a request, the generator's context is left.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import structs

from scheduler.errors import BadRequest
from serving.metrics import CLIENT_LEFT, OK
from serving.openai import requests
from serving.openai.errors import failure_of, status_of
from serving.openai.replies import DONE, ChatReply, Collected, CompletionReply, PromptDetails, Usage
from serving.wish import read_wish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from serving.ask import Delta, Generator, Stream
    from serving.metrics import Metrics, RequestRecord
    from serving.openai.limits import HttpLimits
    from serving.openai.replies import Reply
    from serving.openai.requests import Call

# Set on every request before a handler sees it.
REQUEST_ID = web.RequestKey("request_id", str)

_SSE_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
APART_S = 0.004  # between two packets of one stream: none of its readers reads faster
_PACKET_MOST = 1 << 14  # bytes


class Dialect(NamedTuple):
    """How one endpoint reads a body and words an answer."""

    id_prefix: str
    parse: Callable[[bytes, str, float, HttpLimits], Call]
    reply: Callable[[Call], Reply]


CHAT = Dialect("chatcmpl", requests.chat, ChatReply)
COMPLETION = Dialect("cmpl", requests.completion, CompletionReply)


class Endpoints:
    """POST /v1/chat/completions and POST /v1/completions, on any Generator."""

    def __init__(self, generator: Generator, metrics: Metrics, limits: HttpLimits) -> None:
        self._generator = generator
        self._metrics = metrics
        self._limits = limits
        self._sweep = Sweep()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._counted(CHAT, request)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._counted(COMPLETION, request)

    async def _counted(self, dialect: Dialect, request: web.Request) -> web.StreamResponse:
        with self._metrics.request() as record:
            try:
                return await self._answer(dialect, request, record)
            except Exception as error:
                record.code = status_of(error)
                raise

    async def _answer(
        self, dialect: Dialect, request: web.Request, record: RequestRecord
    ) -> web.StreamResponse:
        created = time.time()
        ask_id = f"{dialect.id_prefix}-{request[REQUEST_ID]}"
        body = await read_body(request, self._limits)
        call = dialect.parse(body, ask_id, created, self._limits)
        wish = read_wish(request.headers, call.priority)
        call = structs.replace(call, ask=structs.replace(call.ask, wish=wish))
        if any(info.name == call.ask.model for info in self._generator.models()):
            record.model = call.ask.model
        reply = dialect.reply(call)
        if call.stream:
            events = Events(request, self._sweep, self._limits.stall_s)
            await self._stream(call, reply, events, record)
            return events.response
        return await self._whole(call, reply, record)

    async def _whole(self, call: Call, reply: Reply, record: RequestRecord) -> web.Response:
        collected = Collected()

        def take(delta: Delta) -> bool:
            record.saw(delta)
            collected.add(delta)
            return True

        async with self._generator.open(call.ask) as stream:
            _accept(record, call, stream)
            await stream.pour(take)
        body = reply.body(collected.choices(), _usage(record))
        record.code = OK
        return web.Response(body=body, content_type="application/json")

    async def _stream(
        self, call: Call, reply: Reply, events: Events, record: RequestRecord
    ) -> None:
        def take(delta: Delta) -> bool:
            record.saw(delta)
            return events.add(reply.chunk(delta), last=delta.finish is not None)

        try:
            async with self._generator.open(call.ask) as stream:
                _accept(record, call, stream)
                await events.begin()
                while not await stream.pour(take):
                    await events.drain()
            usage = reply.usage_chunk(_usage(record)) if call.include_usage else b""
            await events.end(usage + DONE)
            record.code = OK
        except ClientLeft:
            record.code = CLIENT_LEFT
        except Exception as error:
            if not events.begun:
                raise
            record.code = status_of(error)
            with suppress(ClientLeft):
                await events.end(failure_of(error, events.request_id).event)
        finally:
            events.close()


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
        if last:
            return True
        protocol = self._request.protocol
        if self._first or protocol.writing_paused or len(self._waiting) > _PACKET_MOST:
            return False
        if not self._swept:
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


async def read_body(request: web.Request, limits: HttpLimits) -> bytes:
    """The whole body. Raises BadRequest if it is too large, too slow, or damaged."""
    too_large = BadRequest(
        f"The body must be at most {limits.body_bytes} bytes.", code="body_too_large", status=413
    )
    if (request.content_length or 0) > limits.body_bytes:
        raise too_large
    try:
        if request.content.is_eof():  # it is here already
            return await request.read()
        async with asyncio.timeout(limits.body_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        message = f"The body did not arrive within {limits.body_s:g} s."
        raise BadRequest(message, code="body_too_slow", status=408) from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        message = f"The body is not encoded as its headers say: {error}."
        raise BadRequest(message, code="invalid_encoding") from None


def _accept(record: RequestRecord, call: Call, stream: Stream) -> None:
    record.model = call.ask.model
    record.prompt_tokens = stream.prompt_tokens
    record.choices = call.ask.n * len(call.ask.prompts)


def _usage(record: RequestRecord) -> Usage:
    prompt, completion = record.prompt_tokens, record.completion_tokens
    cached = PromptDetails(record.cached_tokens)
    return Usage(prompt, completion, prompt + completion, cached)
