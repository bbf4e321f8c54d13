"""A server whose TTFT and ITL are known: what the harness is checked against.

It speaks enough of OpenAI's API to be measured, computes nothing, and keeps its times to some
50 µs. With `slots` it is a queue: each request waits for one of so many servers and holds it for
the prefill time, so Poisson arrivals make it M/D/c, whose waiting times are known exactly.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, cast

import msgspec

from loadtest.deadlines import Deadlines

if TYPE_CHECKING:
    from collections.abc import Callable

_HEAD_LIMIT = 64 * 1024
_BODY_LIMIT = 64 * 1024 * 1024


class Behaviour(msgspec.Struct, frozen=True):
    """Seconds. A chunk carries one token; the n-th leaves at arrival + wait + ttft + (n-1) itl."""

    ttft: float = 0.05
    itl: float = 0.01
    slots: int | None = None  # how many prefills run at once; None: as many as come


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    max_tokens: int = 16
    stream: bool = False
    stream_options: _StreamOptions | None = None
    messages: list[dict[str, str]] = []
    prompt: str = ""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.split()) + sum(len(m["content"].split()) for m in self.messages)


class Slots:
    """First come, first served, by `slots` servers that each take `ttft` seconds."""

    def __init__(self, behaviour: Behaviour, deadlines: Deadlines) -> None:
        self._behaviour = behaviour
        self._deadlines = deadlines
        self._busy = 0
        self._queue: deque[Answer] = deque()

    def enter(self, answer: Answer, now: float) -> None:
        if self._behaviour.slots is None or self._busy < self._behaviour.slots:
            self._busy += 1
            self._serve(answer, now)
        else:
            self._queue.append(answer)

    def _serve(self, answer: Answer, start: float) -> None:
        end = start + self._behaviour.ttft
        self._deadlines.at(end, lambda: self._served(answer, end))

    def _served(self, answer: Answer, end: float) -> None:
        """The slot is free at `end`, not when this call came: lateness must not add up."""
        self._busy -= 1
        while self._queue:
            waiting = self._queue.popleft()
            if not waiting.cancelled:
                self._busy += 1
                self._serve(waiting, end)
                break
        answer.start(end)


class Answer:
    """One streamed answer on its way out."""

    def __init__(self, server: Server, write: Callable[[bytes], None], body: _Body) -> None:
        self._server = server
        self._write = write
        self._body = body
        self._sent = 0
        self.cancelled = False

    def start(self, now: float) -> None:
        if self.cancelled:
            return
        if not self._body.stream:
            count = self._body.max_tokens
            last = now + self._server.behaviour.itl * (count - 1)
            self._server.deadlines.at(last, self._whole)
            return
        self._write(_STREAM_HEAD)
        self._next(now)

    def _next(self, due: float) -> None:
        if self.cancelled:
            return
        self._write(_token_chunk(self._sent))
        self._sent += 1
        if self._sent < self._body.max_tokens:
            later = due + self._server.behaviour.itl
            self._server.deadlines.at(later, lambda: self._next(later))
            return
        end = _frame(b'{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}')
        if self._body.stream_options and self._body.stream_options.include_usage:
            end += _frame(b'{"choices":[],"usage":%s}' % self._usage())
        self._write(end + _frame(b"[DONE]") + b"0\r\n\r\n")

    def _whole(self) -> None:
        if self.cancelled:
            return
        text = "".join(_token(at) for at in range(self._body.max_tokens)).encode()
        body = (
            b'{"choices":[{"index":0,"message":{"role":"assistant","content":"%s"},'
            b'"finish_reason":"length"}],"usage":%s}' % (text, self._usage())
        )
        self._write(_reply(b"200 OK", body))

    def _usage(self) -> bytes:
        prompt, completion = self._body.prompt_tokens, self._body.max_tokens
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            prompt,
            completion,
            prompt + completion,
        )


class Server:
    """Listens until closed; `async with Server(behaviour) as server: server.port`."""

    def __init__(self, behaviour: Behaviour, host: str = "127.0.0.1", port: int = 0) -> None:
        self.behaviour = behaviour
        self._address = host, port
        self.port = port
        self._open: set[_Connection] = set()

    async def __aenter__(self) -> Server:
        loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(loop)
        self.slots = Slots(self.behaviour, self.deadlines)
        self._listener = await loop.create_server(
            lambda: _Connection(self, self._open), *self._address, backlog=4096
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for connection in list(self._open):
            connection.close()
        await self._listener.wait_closed()
        self.deadlines.close()


class _Connection(asyncio.Protocol):
    def __init__(self, server: Server, all_open: set[_Connection]) -> None:
        self._server = server
        self._all_open = all_open
        self._buffer = b""
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._all_open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all_open.discard(self)
        if self._answer is not None:
            self._answer.cancelled = True

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = _content_length(head)
            if not 0 <= length <= _BODY_LIMIT:
                self.close()
                return
            stop = end + 4 + length
            if len(self._buffer) < stop:
                return
            body, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            self._handle(head.split(b" ", 2)[:2], body, now)
        if len(self._buffer) > _HEAD_LIMIT:
            self.close()

    def _handle(self, line: list[bytes], body: bytes, now: float) -> None:
        if line == [b"GET", b"/v1/models"]:
            self._transport.write(_reply(b"200 OK", b'{"object":"list","data":[{"id":"known"}]}'))
        elif line == [b"GET", b"/health"]:
            self._transport.write(_reply(b"200 OK", b"{}"))
        elif line[:1] == [b"POST"] and line[1].endswith(b"/completions"):
            self._complete(body, now)
        else:
            self._transport.write(_reply(b"404 Not Found", b'{"error":{"message":"no such path"}}'))

    def _complete(self, body: bytes, now: float) -> None:
        try:
            asked = msgspec.json.decode(body, type=_Body)
        except msgspec.DecodeError as error:
            message = msgspec.json.encode({"error": {"message": str(error)}})
            self._transport.write(_reply(b"400 Bad Request", message))
            return
        self._answer = Answer(self._server, self._transport.write, asked)
        self._server.slots.enter(self._answer, now)


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def _reply(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value) if value.strip().isdigit() else -1
    return 0


def _token(at: int) -> str:
    """The text of the token at a position: it says which it is."""
    return f" t{at}"


def _frame(event: bytes) -> bytes:
    return b"%x\r\ndata: %s\n\n\r\n" % (len(event) + 8, event)


_CHUNKS: list[bytes] = []


def _token_chunk(at: int) -> bytes:
    while len(_CHUNKS) <= at:
        text = _token(len(_CHUNKS)).encode()
        _CHUNKS.append(
            _frame(
                b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"known","choices":'
                b'[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}' % text
            )
        )
    return _CHUNKS[at]
