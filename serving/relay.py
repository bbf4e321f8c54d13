"""Plain OpenAI endpoints behind the router: vLLM, SGLang, llama.cpp's server, another router.

Bodies and answers pass as bytes. An endpoint is asked for its models every second; whoever has the
fewest requests in flight gets the next one. Until the first byte has gone to the client a request
whose endpoint fails is asked of another one; afterwards its stream ends with an error event, since
tokens of an engine that is not ours cannot be computed again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from scheduler.errors import Unavailable, WorkerLost
from serving.direct import REQUEST_ID, Whole, Written, fields_of
from serving.endpoint import Endpoint
from serving.metrics import CLIENT_LEFT
from serving.openai.errors import failure_of, status_of
from serving.openai.events import ClientLeft, Events, Sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiohttp import web
    from prometheus_client.core import Metric

    from serving.ask import Generator, ModelInfo
    from serving.metrics import RequestRecord
    from serving.openai.limits import HttpLimits
    from serving.upstream import Answer, Upstream

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two questions what an endpoint serves
MISSES = 2  # of answers to these, then it is lost
BUSY = (502, 503, 504)  # another endpoint may know better
# Headers that belong to one connection, and those that are written here.
_OWN = frozenset(
    b"host content-length connection keep-alive transfer-encoding te trailer upgrade expect"
    b" proxy-connection accept-encoding content-encoding x-request-id".split()
)
_HOP = {"content-length", "connection", "keep-alive", "transfer-encoding", "trailer", "upgrade"}
_HOP |= {"date", "server", "x-request-id"}


class Peek(msgspec.Struct):
    model: str


_PEEK = msgspec.json.Decoder(Peek)


class Relay:
    """The endpoints, as one. `run` must be running."""

    def __init__(
        self,
        urls: Sequence[str],
        generator: Generator,
        limits: HttpLimits,
        *,
        alone: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A model that a worker serves is not relayed; `alone`, there are to be no workers.

        Raises SetupError.
        """
        self.endpoints = [Endpoint(url) for url in urls]
        self.retried = 0  # requests asked of another endpoint
        self._generator = generator
        self._limits = limits
        self._alone = alone
        self._clock = clock
        self._sweep = Sweep()
        self._requests = 0
        self._known: set[str] = set()  # models that were ever here

    def models(self) -> list[ModelInfo]:
        """Those that are here now, and that no worker serves."""
        own = {info.name for info in self._generator.models()}
        infos = {
            name: info for each in self.endpoints for name, info in (each.models or {}).items()
        }
        return [info for name, info in infos.items() if name not in own]

    @property
    def ready(self) -> bool:
        """An endpoint answers, and the workers beside them are ready."""
        here = any(endpoint.models for endpoint in self.endpoints)
        return here and (self._alone or self._generator.ready)

    async def run(self) -> None:
        """Watch the endpoints until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for endpoint in self.endpoints:
                    tasks.create_task(self._watch(endpoint))
        finally:
            for endpoint in self.endpoints:
                endpoint.close()

    def collect(self) -> Iterator[Metric]:
        """For Prometheus: register it in the router's registry."""
        up = GaugeMetricFamily("motley_endpoint_up", "1 while it answers.", labels=["endpoint"])
        busy = GaugeMetricFamily(
            "motley_endpoint_requests_in_flight", "Requests being relayed.", labels=["endpoint"]
        )
        for each in self.endpoints:
            up.add_metric([each.url], bool(each.models))
            busy.add_metric([each.url], each.in_flight)
        said = "Requests asked of another endpoint, before their first byte."
        yield from (up, busy, CounterMetricFamily("motley_endpoint_retries", said, self.retried))

    def claims(self, body: bytes) -> str | None:
        """The model that a body asks for, if an endpoint serves it and no worker does."""
        try:
            model = _PEEK.decode(body).model
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None  # whoever reads it closely says what is wrong
        if model not in self._known:
            return None
        return None if any(i.name == model for i in self._generator.models()) else model

    async def answer(
        self, request: web.BaseRequest, body: bytes, model: str, record: RequestRecord
    ) -> Written:
        """Ask endpoints in turn until one answers. Raises Unavailable."""
        record.model = model
        head, reason = _head(request), "none is here"
        tried: list[Endpoint] = []
        while endpoint := self._choose(model, tried):
            self.retried += bool(tried)
            tried.append(endpoint)
            endpoint.in_flight += 1
            try:
                return await self._try(endpoint, request, head, body, record)
            except WorkerLost as error:
                endpoint.breaker.failed(self._clock())
                reason = f"{endpoint.url}: {error}"
                logger.info("request %s: %s", request[REQUEST_ID], reason)
            finally:
                endpoint.in_flight -= 1
                endpoint.breaker.untried()
        message = f"no endpoint that serves {model!r} answers: {reason}"
        raise Unavailable(message, retry_after=LOOK_S)

    def _choose(self, model: str, tried: Sequence[Endpoint]) -> Endpoint | None:
        """The one with the fewest requests in flight, and of these the one that rested longest."""
        now = self._clock()
        here = [e for e in self.endpoints if e.models and model in e.models and e not in tried]
        if not here:
            return None
        chosen = min(here, key=lambda e: (not e.breaker.allows(now), e.in_flight, e.turn))
        self._requests += 1
        chosen.turn = self._requests
        chosen.breaker.tried(now)
        return chosen

    async def _try(
        self,
        endpoint: Endpoint,
        request: web.BaseRequest,
        head: bytes,
        body: bytes,
        record: RequestRecord,
    ) -> Written:
        """One endpoint's answer. Raises WorkerLost if nothing of it went to the client."""
        path = request.rel_url.raw_path.encode()
        upstream, answer = await endpoint.ask(b"POST", path, head, body)
        try:
            if answer.status in BUSY:
                raise WorkerLost(f"it answers with {answer.status}")
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                events = Events(request, self._sweep, self._limits.stall_s)
                record.code = await self._stream(upstream, answer, events)
                response: Written = events.response
            else:
                whole = await answer.body()
                fields = fields_of(pair for pair in answer.headers.items() if pair[0] not in _HOP)
                response = Whole(request, whole, answer.status, fields)
                record.code = answer.status
            endpoint.breaker.succeeded()
            return response
        finally:
            endpoint.release(upstream)

    async def _stream(self, upstream: Upstream, answer: Answer, events: Events) -> int:
        """Pass events on; the request's code. Raises WorkerLost before the first byte."""

        def take(piece: bytes) -> bool:
            if not events.begun:
                events.begin()
            return events.add(piece, last=piece.endswith(b"[DONE]\n\n"))

        try:
            while not await answer.stream.pour(take):
                upstream.pause()
                await events.drain()
                upstream.resume()
            if not events.begun:
                events.begin()
            await events.end(b"")
        except ClientLeft:
            return CLIENT_LEFT
        except WorkerLost as error:
            if not events.begun:
                raise
            lost = Unavailable(f"the endpoint was lost in the middle of its answer: {error}")
            with suppress(ClientLeft):
                await events.end(failure_of(lost, events.request_id).event)
            return status_of(lost)
        finally:
            events.close()
        return answer.status

    async def _watch(self, endpoint: Endpoint) -> None:
        misses = 0
        while True:
            try:
                await endpoint.look()
                self._known.update(endpoint.models or ())
                misses = 0
            except (WorkerLost, TimeoutError, msgspec.MsgspecError, ValueError) as error:
                misses += 1
                if misses == MISSES:
                    logger.warning("endpoint %s is lost: %r", endpoint.url, error)
                    endpoint.close()
            await asyncio.sleep(LOOK_S)


def _head(request: web.BaseRequest) -> bytes:
    """The client's headers that the endpoint is to see, and the request's id."""
    lines = [b"%b: %b\r\n" % pair for pair in request.raw_headers if pair[0].lower() not in _OWN]
    lines.append(b"X-Request-Id: %b\r\n" % request[REQUEST_ID].encode())
    return b"".join(lines)
