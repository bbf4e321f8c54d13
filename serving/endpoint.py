"""One plain OpenAI endpoint: where it is, what it serves, and the connections to it."""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import msgspec

from scheduler.breaker import Breaker
from scheduler.errors import SetupError, WorkerLost
from serving.ask import ModelInfo
from serving.metrics import OK
from serving.upstream import Upstream

if TYPE_CHECKING:
    from serving.upstream import Answer

PATIENCE_S = 2.0  # with the question what it serves
CONNECT_S = 5.0


class Listed(msgspec.Struct):
    id: str
    max_model_len: int | None = None  # vLLM's and ours


class Models(msgspec.Struct):
    """GET /v1/models."""

    data: list[Listed]


_MODELS = msgspec.json.Decoder(Models)


class Asked(NamedTuple):
    upstream: Upstream
    answer: Answer


class Endpoint:
    """One of them, and the connections to it."""

    def __init__(self, url: str) -> None:
        """Raises SetupError."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise SetupError(f"{url!r} is no endpoint: write it as http://HOST:PORT")
        self.url = url
        self.models: dict[str, ModelInfo] | None = None  # None: it does not answer
        self.in_flight = 0
        self.turn = 0  # when it was chosen last, in requests
        self.breaker = Breaker()
        self._address = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1").encode()
        self._host = parts.netloc.rpartition("@")[2].encode()
        self._connections: set[Upstream] = set()
        self._idle: list[Upstream] = []  # of these

    async def ask(self, method: bytes, path: bytes, head: bytes, body: bytes) -> Asked:
        """An answer whose status is here; `release` its connection. Raises WorkerLost."""
        line = b"%b %b%b HTTP/1.1\r\nHost: %b\r\n" % (method, self._prefix, path, self._host)
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        while True:
            upstream = await self._connect()
            stale = upstream.used  # it may have been closed over there a moment ago
            answer = upstream.ask(line + head + length, body)
            try:
                await answer.stream.accepted()
            except WorkerLost:
                self.release(upstream)
                if not stale:
                    raise
            except BaseException:
                self.release(upstream)
                raise
            else:
                return Asked(upstream, answer)

    def release(self, upstream: Upstream) -> None:
        """Keep it for the next request if its answer is complete."""
        if upstream.idle:
            self._idle.append(upstream)
        else:
            self._connections.discard(upstream)
            upstream.close()

    def close(self) -> None:
        """Cut all connections: every answer under way is lost."""
        self.models = None
        for upstream in self._connections:
            upstream.close()
        self._connections.clear()
        self._idle.clear()

    async def look(self) -> None:
        """Ask what it serves. Raises WorkerLost, TimeoutError or ValueError."""
        async with asyncio.timeout(PATIENCE_S):
            upstream, answer = await self.ask(b"GET", b"/v1/models", b"", b"")
            try:
                body = await answer.body()
            finally:
                self.release(upstream)
        if answer.status != OK:
            raise WorkerLost(f"GET /v1/models is answered with {answer.status}")
        found, known = _MODELS.decode(body).data, self.models or {}
        self.models = {
            each.id: known.get(each.id) or ModelInfo(each.id, each.max_model_len or 0, time.time())
            for each in found
        }

    async def _connect(self) -> Upstream:
        """An idle connection, or a new one. Raises WorkerLost."""
        while self._idle:
            if (upstream := self._idle.pop()).idle:
                return upstream
            self._connections.discard(upstream)
        host, port = self._address
        try:
            async with asyncio.timeout(CONNECT_S):
                _, upstream = await asyncio.get_running_loop().create_connection(
                    Upstream, host, port, ssl=self._tls
                )
        except (OSError, TimeoutError, UnicodeError) as error:  # the last: no such name can be
            raise WorkerLost(f"no connection: {error!r}") from None
        self._connections.add(upstream)
        return upstream
