"""The bodies of OpenAI's generation endpoints, and how each becomes an Ask.

Fields that OpenAI does not have and vLLM made common: top_k, min_p, repetition_penalty,
ignore_eos, priority, guided_json, guided_regex, guided_choice, guided_grammar. A null counts as
absent. Unknown fields are ignored, as the field's servers do.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec

from scheduler.errors import BadRequest
from scheduler.request import Limits, Message, Prompt, Sampling, ToolCall
from serving.ask import Ask
from serving.openai import checks
from serving.openai.formats import ResponseFormat, grammar
from serving.openai.tools import Named, PastCall, Tool, read_tools

if TYPE_CHECKING:
    from serving.openai.limits import HttpLimits

# An id beyond the model's own vocabulary is refused by the worker, which knows its size.
TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=checks.INT32_MAX)]

ROLES = ("system", "developer", "user", "assistant", "tool")
STOPS_MAX = 16


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Body(msgspec.Struct, kw_only=True):
    """What the two endpoints have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    user: str | None = None
    priority: int | None = None  # vLLM's: a lower one goes first
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Any = None


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Named | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: Any = None


class Call(msgspec.Struct, frozen=True):
    """What is asked, and how the client wants to hear of it."""

    ask: Ask
    stream: bool
    include_usage: bool
    priority: int | None = None


_CHAT = msgspec.json.Decoder(ChatBody)
_COMPLETION = msgspec.json.Decoder(CompletionBody)


def chat(raw: bytes, ask_id: str, created: float, limits: HttpLimits) -> Call:
    """Raises BadRequest, which names the field."""
    body = checks.decode(raw, _CHAT)
    _check(body, least_tokens=1)
    messages = read_messages(body.messages)
    if body.top_logprobs is not None and not body.logprobs:
        raise _refuse("top_logprobs", "is only allowed when logprobs is true")
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    use, definitions, forced = read_tools(body)
    prompt = Prompt(messages=messages, tools=definitions)
    call = _call(body, (prompt,), logprobs, ask_id, created, limits)
    if use and call.ask.grammar:
        field = call.ask.grammar.param
        raise _refuse(field, 'cannot be followed while tools may be called: set tool_choice "none"')
    ask = msgspec.structs.replace(call.ask, tools=use, grammar=forced or call.ask.grammar)
    return msgspec.structs.replace(call, ask=ask)


def completion(raw: bytes, ask_id: str, created: float, limits: HttpLimits) -> Call:
    """Raises BadRequest, which names the field."""
    body = checks.decode(raw, _COMPLETION)
    _check(body, least_tokens=0 if body.echo else 1)
    checks.check_bounds(body, {"logprobs": checks.COMPLETION_LOGPROBS})
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _refuse("best_of", "must be equal to n: choosing among more is not supported")
    call = _call(body, read_prompts(body.prompt, "prompt"), body.logprobs, ask_id, created, limits)
    ask = msgspec.structs.replace(call.ask, echo=bool(body.echo))
    return msgspec.structs.replace(call, ask=ask)


def _check(body: Body, *, least_tokens: int) -> None:
    checks.check_bounds(body)
    checks.check_supported(body)
    if body.max_tokens is not None and body.max_tokens < least_tokens:
        raise _refuse("max_tokens", "must be at least 1, or 0 with echo")
    if body.stream_options is not None and not body.stream:
        raise _refuse("stream_options", "is only allowed when stream is true")
    for token, bias in (body.logit_bias or {}).items():
        if not checks.BIAS.holds(bias):
            raise _refuse("logit_bias", f"must be {checks.BIAS}, which token {token}'s is not")


def _call(
    body: Body,
    prompts: tuple[Prompt, ...],
    logprobs: int | None,
    ask_id: str,
    created: float,
    limits: HttpLimits,
) -> Call:
    ask = Ask(
        id=ask_id,
        model=body.model,
        prompts=prompts,
        sampling=_sampling(body, logprobs),
        limits=Limits(body.max_tokens, _stop(body.stop), bool(body.ignore_eos)),
        n=_n(body.n, len(prompts), limits),
        created=created,
        grammar=grammar(body),
        whole=not body.stream,
    )
    options = body.stream_options
    usage = options is not None and bool(options.include_usage)
    return Call(ask, bool(body.stream), usage, body.priority)


def _sampling(body: Body, logprobs: int | None) -> Sampling:
    return Sampling(
        # Drawn here, once, so that a replay draws the same noise.
        seed=random.getrandbits(63) if body.seed is None else body.seed,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),  # −1 is vLLM's word for off
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _n(asked: int | None, prompts: int, limits: HttpLimits) -> int:
    n = 1 if asked is None else asked
    if not 1 <= n <= limits.n:
        raise _refuse("n", f"must be at least 1 and at most {limits.n}")
    if n * prompts > limits.choices:
        raise _refuse("n", f"times the number of prompts must be at most {limits.choices}")
    return n


def _stop(asked: str | list[str] | None) -> tuple[str, ...]:
    stops = (asked,) if isinstance(asked, str) else tuple(asked or ())
    if len(stops) > STOPS_MAX or "" in stops:
        raise _refuse(
            "stop", f"must be a string or at most {STOPS_MAX} strings, none of them empty"
        )
    return stops


def read_messages(sent: list[ChatMessage]) -> tuple[Message, ...]:
    """Raises BadRequest, which names the field."""
    if not sent:
        raise _refuse("messages", "must hold at least one message")
    return tuple(_message(message, at) for at, message in enumerate(sent))


def _message(message: ChatMessage, at: int) -> Message:
    path = f"messages[{at}]"
    if message.role not in ROLES:
        raise _refuse(f"{path}.role", f"must be one of {', '.join(ROLES)}")
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    if calls and message.role != "assistant":
        raise _refuse(f"{path}.tool_calls", "is only allowed with role assistant")
    content = "" if calls and not message.content else _text(message.content, f"{path}.content")
    return Message(message.role, content, message.name, calls, message.tool_call_id)


def _text(content: str | list[Part] | None, path: str) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise _refuse(path, "must be a string or at least one text part")
    texts = []
    for at, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise _refuse(f"{path}[{at}]", 'must be a part of type "text" with a text')
        texts.append(part.text)
    return "\n".join(texts)  # as vLLM does for templates that take plain text


def read_prompts(prompt: str | list[str | int | list[int]], param: str) -> tuple[Prompt, ...]:
    """Texts or token ids, one or many, as field `param` has them. Raises BadRequest."""
    items: list[Any] = [prompt] if isinstance(prompt, str) else prompt
    kinds = set(map(type, items))
    if kinds == {str}:
        return tuple(Prompt(text=item) for item in items)
    if kinds == {int}:
        return (Prompt(ids=items),)
    if kinds == {list} and all(items):
        return tuple(Prompt(ids=item) for item in items)
    raise _refuse(
        param,
        "must be a string, an array of strings, an array of token ids, or an array of arrays of"
        " token ids, none of them empty",
    )


def _refuse(param: str, rule: str) -> BadRequest:
    return BadRequest(f"{param} {rule}.", param=param, code="invalid_value")
