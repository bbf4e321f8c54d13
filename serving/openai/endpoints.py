"""The two generation endpoints: a body in, a whole answer or server-sent events out.

Headers are held until the generator has accepted a request, so a prompt that only the tokenizer
finds too long is still a 400. Whatever ends a request, the generator's context is left.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import structs

from scheduler.errors import BadRequest
from serving.direct import REQUEST_ID, Whole
from serving.metrics import CLIENT_LEFT, OK
from serving.openai import requests
from serving.openai.errors import failure_of, status_of
from serving.openai.events import ClientLeft, Events, Sweep
from serving.openai.replies import DONE, ChatReply, Collected, CompletionReply, PromptDetails, Usage
from serving.wish import read_wish

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.ask import Delta, Generator, Stream
    from serving.direct import Written
    from serving.metrics import Metrics, RequestRecord
    from serving.openai.limits import HttpLimits
    from serving.openai.replies import Reply
    from serving.openai.requests import Call
    from serving.relay import Relay


class Dialect(NamedTuple):
    """How one endpoint reads a body and words an answer."""

    id_prefix: str
    parse: Callable[[bytes, str, float, HttpLimits], Call]
    reply: Callable[[Call], Reply]


CHAT = Dialect("chatcmpl", requests.chat, ChatReply)
COMPLETION = Dialect("cmpl", requests.completion, CompletionReply)


class Endpoints:
    """POST /v1/chat/completions and POST /v1/completions, on any Generator."""

    def __init__(
        self, generator: Generator, metrics: Metrics, limits: HttpLimits, relay: Relay | None = None
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._limits = limits
        self._relay = relay
        self._sweep = Sweep()

    async def chat(self, request: web.BaseRequest) -> Written:
        return await self._counted(CHAT, request)

    async def completion(self, request: web.BaseRequest) -> Written:
        return await self._counted(COMPLETION, request)

    async def _counted(self, dialect: Dialect, request: web.BaseRequest) -> Written:
        with self._metrics.request() as record:
            try:
                return await self._answer(dialect, request, record)
            except Exception as error:
                record.code = status_of(error)
                raise

    async def _answer(
        self, dialect: Dialect, request: web.BaseRequest, record: RequestRecord
    ) -> Written:
        created = time.time()
        body = await read_body(request, self._limits)
        if self._relay and (model := self._relay.claims(body)):
            return await self._relay.answer(request, body, model, record)
        ask_id = f"{dialect.id_prefix}-{request[REQUEST_ID]}"
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
        return await self._whole(request, call, reply, record)

    async def _whole(
        self, request: web.BaseRequest, call: Call, reply: Reply, record: RequestRecord
    ) -> Whole:
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
        return Whole(request, body)

    async def _stream(
        self, call: Call, reply: Reply, events: Events, record: RequestRecord
    ) -> None:
        def take(delta: Delta) -> bool:
            record.saw(delta)
            return events.add(reply.chunk(delta), last=delta.finish is not None)

        try:
            async with self._generator.open(call.ask) as stream:
                _accept(record, call, stream)
                events.begin()
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


async def read_body(request: web.BaseRequest, limits: HttpLimits) -> bytes:
    """The whole body. Raises BadRequest if it is too large, too slow, or damaged."""
    if (request.content_length or 0) > limits.body_bytes:
        raise _too_large(limits)
    try:
        if request.content.is_eof():  # it is here already
            body = request.content.read_nowait()
            if len(body) > limits.body_bytes:
                raise _too_large(limits)
            return body
        async with asyncio.timeout(limits.body_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limits) from None
    except TimeoutError:
        message = f"The body did not arrive within {limits.body_s:g} s."
        raise BadRequest(message, code="body_too_slow", status=408) from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        message = f"The body is not encoded as its headers say: {error}."
        raise BadRequest(message, code="invalid_encoding") from None


def _too_large(limits: HttpLimits) -> BadRequest:
    message = f"The body must be at most {limits.body_bytes} bytes."
    return BadRequest(message, code="body_too_large", status=413)


def _accept(record: RequestRecord, call: Call, stream: Stream) -> None:
    record.model = call.ask.model
    record.prompt_tokens = stream.prompt_tokens
    record.choices = call.ask.n * len(call.ask.prompts)


def _usage(record: RequestRecord) -> Usage:
    prompt, completion = record.prompt_tokens, record.completion_tokens
    cached = PromptDetails(record.cached_tokens)
    return Usage(prompt, completion, prompt + completion, cached)
