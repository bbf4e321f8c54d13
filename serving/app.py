"""The HTTP edge: routes, health, and an answer of OpenAI's shape for everything that goes wrong."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import re
import secrets
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import msgspec
from aiohttp import HttpVersion11, web
from prometheus_client import CONTENT_TYPE_LATEST

from scheduler.errors import BadRequest, SetupError, Unavailable
from serving.direct import REQUEST_ID, Whole, fields_of
from serving.openai.embeddings import EmbeddingEndpoint
from serving.openai.endpoints import Endpoints
from serving.openai.errors import failure_of
from serving.openai.tokens import TokenEndpoints

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from serving.ask import Generator, ModelInfo
    from serving.direct import Written
    from serving.metrics import Metrics
    from serving.openai.limits import HttpLimits
    from serving.relay import Relay

    Handler = Callable[[web.BaseRequest], Awaitable[Written]]

ID_HEADER = "X-Request-Id"
_ID = re.compile(r"[\x20-\x7e]{1,128}")
_process = secrets.token_hex(8)
_numbers = itertools.count()
_BACKLOG = 1024  # connections that wait to be accepted
_KEEPALIVE_S = 75.0  # idle connections are closed after so long
_READS = ("GET", "HEAD")
_MODEL = "/v1/models/"  # its name follows


class App:
    """Every request's way to its handler, and an answer for what goes wrong on it.

    Two dictionaries: aiohttp's Application, whose routes are patterns and whose requests pass
    middlewares and signals, costs a relayed chat a twentieth more CPU time.
    """

    def __init__(
        self, generator: Generator, metrics: Metrics, limits: HttpLimits, relay: Relay | None = None
    ) -> None:
        generation = Endpoints(generator, metrics, limits, relay)
        embedding = EmbeddingEndpoint(generator, metrics, limits, relay)
        tokens = TokenEndpoints(generator, limits)
        self._state = state = State(generator, metrics, relay)
        self._limits = limits
        self._posts: dict[str, Handler] = {
            "/v1/chat/completions": generation.chat,
            "/v1/completions": generation.completion,
            "/v1/embeddings": embedding.embed,
            "/tokenize": tokens.tokenize,
            "/detokenize": tokens.detokenize,
        }
        self._gets: dict[str, Handler] = {
            "/v1/models": state.models,
            "/ready": state.ready,
            "/metrics": state.metrics,
            "/health": health,
            "/ping": health,
            "/version": version,
        }

    def server(self) -> web.Server:
        """For aiohttp's runner. A client's disconnect cancels its handler."""
        request = partial(
            web.BaseRequest,
            loop=asyncio.get_running_loop(),
            client_max_size=self._limits.body_bytes,
        )
        return web.Server(
            cast("Any", self.answer),  # what it gives is no StreamResponse by descent
            request_factory=request,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_S,
        )

    async def answer(self, request: web.BaseRequest) -> Written:
        """Gives the request its id, and every exception an answer."""
        sent = request.headers.get(ID_HEADER, "")
        request[REQUEST_ID] = sent if _ID.fullmatch(sent) else f"{_process}{next(_numbers):016x}"
        try:
            handler = self._handler(request)
            if "Expect" in request.headers:
                await _expect(request)
            return await handler(request)
        except Exception as error:  # noqa: BLE001 - failure_of logs what nobody foresaw
            failure = failure_of(error, request[REQUEST_ID])
            headers = failure.headers
            if isinstance(error, WrongMethod):
                headers["Allow"] = error.allowed
            fields = fields_of([("Content-Type", "application/json"), *headers.items()])
            return Whole(request, failure.body, failure.status, fields)

    def _handler(self, request: web.BaseRequest) -> Handler:
        """Raises BadRequest where nothing is, and WrongMethod."""
        path, method = request.path, request.method
        post = self._posts.get(path)
        get = self._gets.get(path)
        if path.startswith(_MODEL) and path != _MODEL:
            get = self._state.model
        found = post if method == "POST" else get if method in _READS else None
        if found:
            return found
        route = f"{method} {request.rel_url.raw_path}"
        if post or get:
            raise WrongMethod(route, "POST" if post else ",".join(_READS))
        raise BadRequest(f"{route!a}: Not Found.", status=404)


class WrongMethod(BadRequest):
    """There is something, which this method does not reach."""

    def __init__(self, route: str, allowed: str) -> None:
        super().__init__(f"{route!a}: Method Not Allowed.", status=405)
        self.allowed = allowed


@asynccontextmanager
async def serve(
    app: App, host: str, port: int, *, drain_s: float = 5.0, shared: bool = False
) -> AsyncIterator[tuple[str, int]]:
    """Listen; yields the bound address (port 0 takes a free one).

    A `shared` port is other processes' too: the kernel spreads connections over them. On leaving,
    requests in flight have `drain_s` seconds to end, then they are cancelled. Raises SetupError if
    the address cannot be had.
    """
    runner = web.ServerRunner(app.server(), shutdown_timeout=drain_s)
    await runner.setup()
    try:
        try:
            await web.TCPSite(
                runner, host, port, backlog=_BACKLOG, reuse_port=shared or None
            ).start()
        except (OSError, OverflowError) as error:
            raise SetupError(
                f"Cannot listen for HTTP on {host}:{port}: {error}. Stop what holds the address,"
                " or choose another host or port (port 0 takes a free one)."
            ) from error
        address = runner.addresses[0]
        yield address[0], address[1]
    finally:
        await runner.cleanup()


async def _expect(request: web.BaseRequest) -> None:
    """Have the body sent that a client holds back (RFC 9110, 10.1.1). Raises BadRequest."""
    expected = request.headers["Expect"]
    if expected.lower() != "100-continue":
        raise BadRequest(f"Expect: {expected!a} is not known here.", status=417)
    if request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def health(request: web.BaseRequest) -> Whole:
    """The process lives."""
    return _json(request, {"status": "ok"})


async def version(request: web.BaseRequest) -> Whole:
    try:
        number = importlib.metadata.version("motley")
    except importlib.metadata.PackageNotFoundError:
        number = "unknown"  # run from a checkout that is not installed
    return _json(request, {"version": number})


class State:
    """What can be asked about the system itself."""

    def __init__(self, generator: Generator, metrics: Metrics, relay: Relay | None) -> None:
        self._generator = generator
        self._metrics = metrics
        self._relay = relay

    def _infos(self) -> list[ModelInfo]:
        return [*self._generator.models(), *(self._relay.models() if self._relay else ())]

    async def models(self, request: web.BaseRequest) -> Whole:
        models = [_model(info) for info in self._infos()]
        return _json(request, {"object": "list", "data": models})

    async def model(self, request: web.BaseRequest) -> Whole:
        name = request.path.removeprefix(_MODEL)
        for info in self._infos():
            if info.name == name:
                return _json(request, _model(info))
        message = f"The model {name!a} is not served here: GET /v1/models lists what is."
        raise BadRequest(message, param="model", code="model_not_found", status=404)

    async def ready(self, request: web.BaseRequest) -> Whole:
        if not (self._relay or self._generator).ready:
            raise Unavailable("Some models still wait for workers.")
        return _json(request, {"status": "ready"})

    async def metrics(self, request: web.BaseRequest) -> Whole:
        fields = fields_of([("Content-Type", CONTENT_TYPE_LATEST)])
        return Whole(request, self._metrics.exposition(), fields=fields)


def _model(info: ModelInfo) -> dict[str, object]:
    return {
        "id": info.name,
        "object": "model",
        "created": int(info.created),
        "owned_by": "motley",
        "max_model_len": info.context_length,  # vLLM's extension
    }


def _json(request: web.BaseRequest, value: object) -> Whole:
    return Whole(request, msgspec.json.encode(value))
