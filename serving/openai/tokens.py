"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from scheduler.errors import BadRequest
from scheduler.request import Prompt
from serving.direct import Whole
from serving.openai import checks
from serving.openai.endpoints import read_body
from serving.openai.requests import ChatMessage, TokenId, read_messages
from serving.openai.tools import Tool, define

if TYPE_CHECKING:
    from aiohttp import web

    from scheduler.messages import Tokenised
    from serving.ask import Generator
    from serving.openai.limits import HttpLimits


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A text, or a chat."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None  # around a text; default true
    add_generation_prompt: bool | None = None  # after a chat; default true
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct):
    model: str
    tokens: list[TokenId]


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: tuple[str, ...] | None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


_TOKENIZE = msgspec.json.Decoder(TokenizeBody)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeBody)


class TokenEndpoints:
    """The router asks a worker: it has no tokenizer."""

    def __init__(self, generator: Generator, limits: HttpLimits) -> None:
        self._generator = generator
        self._limits = limits

    async def tokenize(self, request: web.BaseRequest) -> Whole:
        body = checks.decode(await read_body(request, self._limits), _TOKENIZE)
        found = await self._ask(body.model, _prompt(body))
        infos = self._generator.models()
        lengths = [info.context_length for info in infos if info.name == body.model]
        strings = found.spelled if body.return_token_strs else None
        return _json(
            request, Tokenized(len(found.ids), max(lengths, default=0), found.ids, strings)
        )

    async def detokenize(self, request: web.BaseRequest) -> Whole:
        body = checks.decode(await read_body(request, self._limits), _DETOKENIZE)
        if not body.tokens:
            return _json(request, Detokenized(""))
        try:
            found = await self._ask(body.model, Prompt(ids=body.tokens))
        except BadRequest as error:
            if error.param != "prompt":
                raise
            raise BadRequest(error.message, param="tokens", code=error.code) from None
        return _json(request, Detokenized(found.text))

    async def _ask(self, model: str, prompt: Prompt) -> Tokenised:
        return await self._generator.tokenise(model, prompt, time.time())


def _prompt(body: TokenizeBody) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        message = "Exactly one of prompt and messages is required."
        raise BadRequest(message, param="prompt", code="missing_required_parameter")
    if body.messages is None:
        return Prompt(text=body.prompt, special=body.add_special_tokens is not False)
    return Prompt(
        messages=read_messages(body.messages),
        tools=define(body.tools) if body.tools else None,
        generation=body.add_generation_prompt is not False,
    )


def _json(request: web.BaseRequest, value: msgspec.Struct) -> Whole:
    return Whole(request, msgspec.json.encode(value))
