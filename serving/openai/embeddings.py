"""POST /v1/embeddings: the last token's hidden state of each input, of length 1."""

from __future__ import annotations

import base64
import time
from array import array
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from scheduler.errors import BadRequest
from scheduler.request import Limits, Sampling
from serving.ask import Ask
from serving.direct import REQUEST_ID, Whole
from serving.metrics import OK
from serving.openai import checks
from serving.openai.endpoints import read_body
from serving.openai.errors import status_of
from serving.openai.requests import TokenId, read_prompts

if TYPE_CHECKING:
    from aiohttp import web

    from serving.ask import Delta, Generator
    from serving.direct import Written
    from serving.metrics import Metrics, RequestRecord
    from serving.openai.limits import HttpLimits
    from serving.relay import Relay

Vector: TypeAlias = list[float] | str
FORMATS = ("float", "base64")


class EmbeddingBody(msgspec.Struct):
    model: str
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None


class Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: Vector
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


_DECODER = msgspec.json.Decoder(EmbeddingBody)


class EmbeddingEndpoint:
    """On any Generator; each input is a job that ends with its prompt."""

    def __init__(
        self, generator: Generator, metrics: Metrics, limits: HttpLimits, relay: Relay | None = None
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._limits = limits
        self._relay = relay

    async def embed(self, request: web.BaseRequest) -> Written:
        with self._metrics.request() as record:
            try:
                raw = await read_body(request, self._limits)
                if self._relay and (model := self._relay.claims(raw)):
                    return await self._relay.answer(request, raw, model, record)
                response = await self._answer(request, raw, record)
            except Exception as error:
                record.code = status_of(error)
                raise
            record.code = OK
            return response

    async def _answer(self, request: web.BaseRequest, raw: bytes, record: RequestRecord) -> Whole:
        created = time.time()
        body = checks.decode(raw, _DECODER)
        ask = _ask(body, f"embd-{request[REQUEST_ID]}", created, self._limits)
        vectors: dict[int, Vector] = {}

        def take(delta: Delta) -> bool:
            vectors[delta.index] = _vector(delta.embedding, body.encoding_format)
            return True

        try:
            async with self._generator.open(ask) as stream:
                record.model = ask.model
                record.prompt_tokens = stream.prompt_tokens
                await stream.pour(take)
        except BadRequest as error:
            if error.param != "prompt":
                raise
            raise BadRequest(error.message, param="input", code=error.code) from None
        data = [Embedding(index, vectors[index]) for index in sorted(vectors)]
        usage = EmbeddingUsage(record.prompt_tokens, record.prompt_tokens)
        answer = msgspec.json.encode(Embeddings(data, ask.model, usage))
        return Whole(request, answer)


def _ask(body: EmbeddingBody, ask_id: str, created: float, limits: HttpLimits) -> Ask:
    if body.dimensions is not None:
        message = "dimensions is not supported: the model's own size is what there is."
        raise BadRequest(message, param="dimensions", code="unsupported_parameter")
    if body.encoding_format not in (None, *FORMATS):
        message = f"encoding_format must be one of {', '.join(FORMATS)}."
        raise BadRequest(message, param="encoding_format", code="invalid_value")
    prompts = read_prompts(body.input, "input")
    if len(prompts) > limits.choices:
        message = f"input must be at most {limits.choices} texts."
        raise BadRequest(message, param="input", code="invalid_value")
    return Ask(
        id=ask_id,
        model=body.model,
        prompts=prompts,
        sampling=Sampling(seed=0, temperature=0.0),
        limits=Limits(max_tokens=0),
        n=1,
        created=created,
        embed=True,
    )


def _vector(raw: bytes, encoding: str | None) -> Vector:
    """`raw` is float32, little-endian, on the wire between our processes and in base64 alike."""
    if encoding == "base64":
        return base64.b64encode(raw).decode()
    return array("f", raw).tolist()
