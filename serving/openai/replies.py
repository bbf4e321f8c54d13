"""Deltas as OpenAI's bodies and server-sent events.

What is the same in every chunk of a stream is encoded once, so that a token costs one small encode.
"""

from __future__ import annotations

import codecs
import secrets
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

import msgspec

from scheduler.messages import CallDelta, FinishReason
from serving.ask import Delta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.messages import Echo, TokenLogprob
    from serving.openai.requests import Call

DONE = b"data: [DONE]\n\n"
# JSON has no −inf; OpenAI says −9999 for "very unlikely".
LOGPROB_MIN = -9999.0

_encode = msgspec.json.Encoder().encode


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails(0)


class Envelope(msgspec.Struct, frozen=True):
    """What every chunk of a stream repeats."""

    id: str
    object: str
    created: int
    model: str


class ChatTop(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTop]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatToken]
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True, omit_defaults=True):
    arguments: str
    name: str | None = None


class ChatCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool call, or a piece of one: the first piece has id, type and name."""

    function: CalledFunction
    index: int | None = None  # only in a stream
    id: str | None = None
    type: str | None = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    content: str | None = None
    role: str | None = None
    tool_calls: list[ChatCall] | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ChatCall] | msgspec.UnsetType = msgspec.UNSET


class ChatPiece(msgspec.Struct, frozen=True):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice of a whole body."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def add(self, token: TokenLogprob, offset: int) -> None:
        self.tokens.append(token.token)
        self.token_logprobs.append(_finite(token.logprob))
        self.top_logprobs.append(_text_top(token))
        self.text_offset.append(offset)


class TextChoice(msgspec.Struct, frozen=True):
    """One choice, of a chunk and of a whole body alike."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Reply(ABC):
    """One request's answer. A subclass says what a choice looks like."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, call: Call) -> None:
        ask = call.ask
        kind = self.chunk_object if call.stream else self.whole_object
        envelope = _encode(Envelope(ask.id, kind, int(ask.created), ask.model))
        self._head = envelope[:-1] + b',"choices":['
        self._event_head = b"data: " + self._head
        self._event_tail = b'],"usage":null}\n\n' if call.include_usage else b"]}\n\n"
        self._with_logprobs = ask.sampling.logprobs is not None
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # around a text, by choice

    def chunk(self, delta: Delta) -> bytes:
        """The event that carries `delta`."""
        frame = self._frames.get(delta.index)
        if frame and delta.finish is None and not delta.calls:
            return b"".join((frame[0], _encode(delta.text), frame[1]))
        event = self._event(delta)
        if frame is None and not self._with_logprobs:
            text = Delta(delta.index, "", 1)  # as all are that only add text to what has begun
            before, _, after = self._event(text).rpartition(b'""')
            self._frames[delta.index] = before, after
        return event

    def _event(self, delta: Delta) -> bytes:
        return b"".join((self._event_head, _encode(self._piece(delta)), self._event_tail))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event that ends a stream of a client that asked for usage."""
        return b"".join((self._event_head, b'],"usage":', _encode(usage), b"}\n\n"))

    def body(self, choices: Sequence[Delta], usage: Usage) -> bytes:
        """The whole answer; `choices` holds one Delta for each."""
        encoded = b",".join(_encode(self._choice(choice)) for choice in choices)
        return b"".join((self._head, encoded, b'],"usage":', _encode(usage), b"}"))

    @abstractmethod
    def _piece(self, delta: Delta) -> msgspec.Struct:
        """A choice, as a chunk has it."""

    @abstractmethod
    def _choice(self, choice: Delta) -> msgspec.Struct:
        """A choice, as the whole answer has it."""


class ChatReply(Reply):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._begun: set[int] = set()

    def _piece(self, delta: Delta) -> ChatPiece:
        role = None
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = "assistant"
        calls = [_chat_call(call, call.index) for call in delta.calls] or None
        content = ChatDelta(None if calls and not delta.text else delta.text, role, calls)
        return ChatPiece(delta.index, content, self._logprobs(delta), delta.finish)

    def _choice(self, choice: Delta) -> ChatChoice:
        message = ChatMessage(choice.text)
        if choice.calls:
            calls = [_chat_call(call) for call in choice.calls]
            message = ChatMessage(choice.text or None, tool_calls=calls)
        return ChatChoice(choice.index, message, self._logprobs(choice), choice.finish)

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs([_chat_token(token) for token in delta.logprobs])


class CompletionReply(Reply):
    whole_object = chunk_object = "text_completion"

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._offsets: defaultdict[int, Offsets] = defaultdict(Offsets)
        self._prompts = [prompt.text for prompt in call.ask.prompts for _ in range(call.ask.n)]

    def _piece(self, delta: Delta) -> TextChoice:
        text = delta.text
        if delta.echo:
            text = self._prompt(delta.index, delta.echo) + text
        return TextChoice(delta.index, text, self._logprobs(delta), delta.finish)

    def _choice(self, choice: Delta) -> TextChoice:
        return self._piece(choice)

    def _logprobs(self, delta: Delta) -> TextLogprobs | None:
        if not self._with_logprobs:
            return None
        found = TextLogprobs([], [], [], [])
        offsets = self._offsets[delta.index]
        if echo := delta.echo:
            offsets.hide(echo, self._prompt(delta.index, echo))
            found.tokens.append(echo.first.decode(errors="replace"))
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            found.text_offset.append(offsets.take(echo.first))
            for token in echo.tokens:
                found.add(token, offsets.take(token.raw))
        for token in delta.logprobs:
            found.add(token, offsets.take(token.raw))
        return found

    def _prompt(self, index: int, echo: Echo) -> str:
        """As the client sent it, or as its ids read."""
        sent = self._prompts[index]
        return echo.text if sent is None else sent


class Offsets:
    """Where in a choice's text, in characters, each token begins.

    Counted on bytes: a token may hold only a part of a character, and then begins where it does.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0
        self._hidden = 0  # bytes

    def hide(self, echo: Echo, prompt: str) -> None:
        """Do not count what the tokenizer put before the prompt: bos, or the space of a word."""
        raw = echo.first + b"".join(token.raw for token in echo.tokens)
        if raw.endswith(sent := prompt.encode()):
            self._hidden = len(raw) - len(sent)

    def take(self, raw: bytes) -> int:
        start = self._characters
        hidden = min(self._hidden, len(raw))
        self._hidden -= hidden
        raw = raw[hidden:]
        self._characters += len(self._decoder.decode(raw))
        return start


class Collected:
    """The choices of an answer that is not streamed, as they grow."""

    def __init__(self) -> None:
        self._deltas: defaultdict[int, list[Delta]] = defaultdict(list)

    def add(self, delta: Delta) -> None:
        self._deltas[delta.index].append(delta)

    def choices(self) -> list[Delta]:
        """One Delta for each choice, in the order of their indices."""
        return [_join(self._deltas[index]) for index in sorted(self._deltas)]


def _join(deltas: list[Delta]) -> Delta:
    last = deltas[-1]
    assert last.finish is not None, f"choice {last.index} ended without a reason"
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        tokens=sum(delta.tokens for delta in deltas),
        logprobs=tuple(token for delta in deltas for token in delta.logprobs),
        finish=last.finish,
        calls=_join_calls(deltas),
        echo=deltas[0].echo,
        cached=deltas[0].cached,
    )


def _join_calls(deltas: list[Delta]) -> tuple[CallDelta, ...]:
    """The calls of one choice, each in one piece."""
    names: dict[int, str | None] = {}
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    for call in (call for delta in deltas for call in delta.calls):
        names.setdefault(call.index, call.name)
        arguments[call.index].append(call.arguments)
    return tuple(CallDelta(i, name, "".join(arguments[i])) for i, name in names.items())


def _chat_call(call: CallDelta, index: int | None = None) -> ChatCall:
    function = CalledFunction(call.arguments, call.name)
    if call.name is None:
        return ChatCall(function, index)
    # Nine characters, because Mistral's chat templates refuse to read others back.
    return ChatCall(function, index, secrets.token_hex(5)[:9], "function")


def _finite(logprob: float) -> float:
    return max(LOGPROB_MIN, logprob)


def _chat_token(token: TokenLogprob) -> ChatToken:
    top = [ChatTop(other.token, _finite(other.logprob), list(other.raw)) for other in token.top]
    return ChatToken(token.token, _finite(token.logprob), list(token.raw), top)


def _text_top(token: TokenLogprob) -> dict[str, float]:
    """The drawn token is always there. Of tokens with the same text, the likeliest counts."""
    top = {token.token: _finite(token.logprob)}
    for other in token.top:
        top[other.token] = max(top.get(other.token, LOGPROB_MIN), _finite(other.logprob))
    return top
