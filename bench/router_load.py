"""The load on a router: HTTP as bytes on raw sockets, so that it costs little beside the router.

    python bench/router_load.py '{"port": 8000, "connections": 16, "requests": 1000, …}'

Prints one line of JSON (`Loaded`). A process of its own: its CPU time is not the router's.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from typing import cast

import msgspec
import uvloop

DONE = b"data: [DONE]"
EVENT = b"data: "
PATIENCE_S = 180.0  # for one request


class Load(msgspec.Struct, frozen=True):
    """What to ask for. Closed loop: each connection asks again once it is answered."""

    port: int
    path: str
    connections: int
    requests: int  # in all
    model: str
    prompt_bytes: int
    tokens: int  # of each answer
    stream: bool
    rate: float = 0.0  # requests a second, open loop; 0: closed loop
    ramp_s: float = 0.0  # over which connections begin, one after the other


class Loaded(msgspec.Struct, frozen=True):
    """What came back. Seconds."""

    requests: int
    errors: int
    reason: str  # of the first error
    events: int  # of streams, [DONE] not counted
    wall: float
    cpu: float  # of the load generator itself
    latencies: list[float]  # whole requests, sorted
    firsts: list[float]  # to the first byte of a body, sorted


class Client(asyncio.Protocol):
    """One connection: a request at a time, kept alive."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None
        self._head = b""
        self._tail = b""
        self._left = -1  # bytes of a body whose length is known
        self._first = 0.0
        self._events = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by descent

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection ended: {error}")

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            return
        if not self._in_body:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._begin(head)
            if not data:
                return
        self._first = self._first or time.perf_counter()
        tail = self._tail + data
        if self._bench.load.stream:
            self._events += tail.count(EVENT) - self._tail.count(EVENT)
        self._tail = tail[-32:]
        if self._left >= 0:
            self._left -= len(data)
            ended = self._left <= 0
        else:
            ended = self._tail.endswith(b"0\r\n\r\n")
        if ended:
            self._answer.set_result(None)

    async def ask(self, request: bytes) -> tuple[float, float, int]:
        """Seconds to the end and to the first byte of the body, and events. Raises OSError."""
        self._answer = asyncio.get_running_loop().create_future()
        self._head = self._tail = b""
        self._in_body, self._left, self._first, self._events = False, -1, 0.0, 0
        assert self._transport
        begun = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(PATIENCE_S):
            await self._answer
        return time.perf_counter() - begun, self._first - begun, self._events

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def _begin(self, head: bytes) -> None:
        self._in_body = True
        status, *lines = head.split(b"\r\n")
        if b" 200" not in status:
            self._fail(status.decode(errors="replace"))
            return
        for line in lines:
            if line.lower().startswith(b"content-length:"):
                self._left = int(line.partition(b":")[2])

    def _fail(self, reason: str) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionError(reason))


class Bench:
    """One load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self._left = load.requests
        self._errors: list[str] = []
        self._events = 0
        self._latencies: list[float] = []
        self._firsts: list[float] = []

    async def run(self) -> Loaded:
        loop, load = asyncio.get_running_loop(), self.load
        clients: list[Client] = []
        for _ in range(load.connections):
            _, client = await loop.create_connection(lambda: Client(self), "127.0.0.1", load.port)
            clients.append(client)
        cpu, begun = _cpu(), time.perf_counter()
        await asyncio.gather(*(self._use(client, at) for at, client in enumerate(clients)))
        wall = time.perf_counter() - begun
        for client in clients:
            client.close()
        return Loaded(
            requests=len(self._latencies),
            errors=len(self._errors),
            reason=self._errors[0] if self._errors else "",
            events=self._events,
            wall=wall,
            cpu=_cpu() - cpu,
            latencies=sorted(self._latencies),
            firsts=sorted(self._firsts),
        )

    async def _use(self, client: Client, at: int) -> None:
        """This connection's share: one request after the other, or each at its time."""
        load = self.load
        interval = load.connections / load.rate if load.rate else 0.0
        start = time.perf_counter() + (interval or load.ramp_s) * at / load.connections
        while self._left > 0 and not self._errors:
            self._left -= 1
            request = _request(load, self._left)
            await asyncio.sleep(max(0.0, start - time.perf_counter()))
            start += interval
            try:
                whole, first, events = await client.ask(request)
            except (OSError, TimeoutError) as error:
                self._errors.append(repr(error))
                return
            self._latencies.append(whole)
            self._firsts.append(first)
            if load.stream:
                self._check(events)

    def _check(self, events: int) -> None:
        """A chunk for each token, one more for the end at most, and [DONE]."""
        self._events += events - 1
        if not self.load.tokens + 1 <= events <= self.load.tokens + 3:
            self._errors.append(f"{events} events for {self.load.tokens} tokens")


def _request(load: Load, number: int) -> bytes:
    words = f"request {number}: " + "The quick brown fox jumps over the lazy dog. " * (
        load.prompt_bytes // 45 + 1
    )
    body = msgspec.json.encode(
        {
            "model": load.model,
            "messages": [
                {"role": "system", "content": "You are helpful."},
                {"role": "user", "content": words[: load.prompt_bytes]},
            ],
            "max_tokens": load.tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": load.stream,
        }
    )
    head = (
        f"POST {load.path} HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    spec = msgspec.json.decode(sys.argv[1], type=Load)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(msgspec.json.encode(runner.run(Bench(spec).run())).decode())
