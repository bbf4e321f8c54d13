"""What is said to an OpenAI endpoint and what its chunks mean."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from loadtest.errors import OptionError

Api = Literal["chat", "completions"]
Message = dict[str, str]

_PATHS: dict[Api, str] = {"chat": "/chat/completions", "completions": "/completions"}


class Endpoint(msgspec.Struct, frozen=True):
    """Where requests go and how they look. `url` ends before `/v1`, or in it."""

    url: str
    model: str
    api: Api = "chat"
    api_key: str = ""
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    slo_headers: bool = False
    extra: dict[str, Any] = {}
    insecure: bool = False  # https without checking the certificate

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError("--url", f"{self.url!r} is not http://HOST[:PORT] or https://…")

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme == "https"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (443 if self.tls else 80)

    def path(self, tail: str) -> str:
        base = urlsplit(self.url).path.rstrip("/")
        return f"{base if base.endswith('/v1') else base + '/v1'}{tail}"

    def post(
        self, messages: list[Message], max_tokens: int, headers: dict[str, str] | None = None
    ) -> bytes:
        """The bytes of one request. A `completions` prompt is the messages' text in a row."""
        body: dict[str, object] = {"model": self.model}
        if self.api == "chat":
            body["messages"] = messages
        else:
            body["prompt"] = "\n".join(message["content"] for message in messages)
        body |= {"max_tokens": max_tokens, "temperature": self.temperature, "stream": self.stream}
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return self._frame(
            "POST", _PATHS[self.api], headers or {}, msgspec.json.encode(body | self.extra)
        )

    def get(self, tail: str) -> bytes:
        return self._frame("GET", tail, {}, b"")

    def _frame(self, method: str, tail: str, headers: dict[str, str], body: bytes) -> bytes:
        lines = [
            f"{method} {self.path(tail)} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc.rpartition('@')[2]}",
            "Accept: text/event-stream, application/json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body:
            lines.append("Content-Type: application/json")
        return "\r\n".join([*lines, "\r\n"]).encode() + body


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        delta = self.delta or self.message
        if delta is None:
            return self.text or ""
        text = delta.content or delta.reasoning_content or delta.reasoning or ""
        return text or "".join(str(bytes(call)) for call in delta.tool_calls or [])


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class Chunk(msgspec.Struct):
    """An event of a stream, or a whole answer; fields that are not measured are skipped."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def said(self) -> str:
        choices = self.choices
        if not choices:
            return ""
        return choices[0].said if len(choices) == 1 else "".join(c.said for c in choices)

    @property
    def finished(self) -> bool:
        return any(choice.finish_reason for choice in self.choices)


decode_chunk = msgspec.json.Decoder(Chunk).decode


class _Error(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    error: _Error


def error_text(body: bytes) -> str:
    """What an error's body says, in OpenAI's shape or any other; at most 200 characters."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error.message[:200]
    except msgspec.DecodeError:
        return body[:200].decode(errors="replace")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def model_names(body: bytes) -> list[str]:
    return [model.id for model in msgspec.json.decode(body, type=_Models).data]
