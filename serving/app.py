"""The HTTP edge: routes, health, and an answer of OpenAI's shape for everything that goes wrong."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from scheduler.errors import BadRequest, SetupError, Unavailable
from serving.direct import REQUEST_ID
from serving.openai.embeddings import EmbeddingEndpoint
from serving.openai.endpoints import Endpoints
from serving.openai.errors import Failure, failure_of
from serving.openai.tokens import TokenEndpoints

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp.typedefs import Handler

    from serving.ask import Generator, ModelInfo
    from serving.metrics import Metrics
    from serving.openai.limits import HttpLimits
    from serving.relay import Relay

ID_HEADER = "X-Request-Id"
_ID = re.compile(r"[\x20-\x7e]{1,128}")
_process = secrets.token_hex(8)
_numbers = itertools.count()
_BACKLOG = 1024  # connections that wait to be accepted
_KEEPALIVE_S = 75.0  # idle connections are closed after so long


def build_app(
    generator: Generator, metrics: Metrics, limits: HttpLimits, relay: Relay | None = None
) -> web.Application:
    """The application; run it with `serve`, which sets what it needs of aiohttp's runner."""
    generation = Endpoints(generator, metrics, limits, relay)
    embedding = EmbeddingEndpoint(generator, metrics, limits, relay)
    tokens = TokenEndpoints(generator, limits)
    state = State(generator, metrics, relay)
    app = web.Application(middlewares=[shield], client_max_size=limits.body_bytes)
    app.on_response_prepare.append(_give_id)
    app.add_routes(
        [
            web.post("/v1/chat/completions", generation.chat),
            web.post("/v1/completions", generation.completion),
            web.post("/v1/embeddings", embedding.embed),
            web.post("/tokenize", tokens.tokenize),
            web.post("/detokenize", tokens.detokenize),
            web.get("/v1/models", state.models),
            web.get("/v1/models/{id:.+}", state.model),
            web.get("/ready", state.ready),
            web.get("/metrics", state.metrics),
            web.get("/health", health),
            web.get("/ping", health),
            web.get("/version", version),
        ]
    )
    return app


@asynccontextmanager
async def serve(
    app: web.Application, host: str, port: int, *, drain_s: float = 5.0, shared: bool = False
) -> AsyncIterator[tuple[str, int]]:
    """Listen; yields the bound address (port 0 takes a free one).

    A `shared` port is other processes' too: the kernel spreads connections over them. A client's
    disconnect cancels its handler. On leaving, requests in flight have `drain_s` seconds to end,
    then they are cancelled too. Raises SetupError if the address cannot be had.
    """
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=_KEEPALIVE_S,
        shutdown_timeout=drain_s,
    )
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


@web.middleware
async def shield(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id, and every exception an answer."""
    sent = request.headers.get(ID_HEADER, "")
    request[REQUEST_ID] = sent if _ID.fullmatch(sent) else f"{_process}{next(_numbers):016x}"
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _refuse_route(request, error)
    except Exception as error:  # noqa: BLE001 - failure_of logs what nobody foresaw
        return _response(failure_of(error, request[REQUEST_ID]))


async def health(_: web.Request) -> web.Response:
    """The process lives."""
    return _json({"status": "ok"})


async def version(_: web.Request) -> web.Response:
    try:
        number = importlib.metadata.version("motley")
    except importlib.metadata.PackageNotFoundError:
        number = "unknown"  # run from a checkout that is not installed
    return _json({"version": number})


class State:
    """What can be asked about the system itself."""

    def __init__(self, generator: Generator, metrics: Metrics, relay: Relay | None) -> None:
        self._generator = generator
        self._metrics = metrics
        self._relay = relay

    def _infos(self) -> list[ModelInfo]:
        return [*self._generator.models(), *(self._relay.models() if self._relay else ())]

    async def models(self, _: web.Request) -> web.Response:
        models = [_model(info) for info in self._infos()]
        return _json({"object": "list", "data": models})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        for info in self._infos():
            if info.name == name:
                return _json(_model(info))
        message = f"The model {name!a} is not served here: GET /v1/models lists what is."
        raise BadRequest(message, param="model", code="model_not_found", status=404)

    async def ready(self, _: web.Request) -> web.Response:
        if not (self._relay or self._generator).ready:
            raise Unavailable("Some models still wait for workers.")
        return _json({"status": "ready"})

    async def metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=self._metrics.exposition(), headers=headers)


def _model(info: ModelInfo) -> dict[str, object]:
    return {
        "id": info.name,
        "object": "model",
        "created": int(info.created),
        "owned_by": "motley",
        "max_model_len": info.context_length,  # vLLM's extension
    }


async def _give_id(request: web.Request, response: web.StreamResponse) -> None:
    # aiohttp answers what is not HTTP at all before `shield` has seen it.
    if (request_id := request.get(REQUEST_ID)) is not None:
        response.headers[ID_HEADER] = request_id


def _refuse_route(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals: no such path, wrong method."""
    route = f"{request.method} {request.rel_url.raw_path}"
    refusal = BadRequest(f"{route!a}: {error.reason}.", status=error.status)
    response = _response(failure_of(refusal, request[REQUEST_ID]))
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _response(failure: Failure) -> web.Response:
    return web.Response(
        status=failure.status,
        body=failure.body,
        headers=failure.headers,
        content_type="application/json",
    )


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
