"""Text of one model: chat template and tokenizer on the way in, detokenising on the way out.

`Tokens` and `TextStream` are what the engine asks for; `Text` is a model's own tokenizer.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scheduler.errors import BadRequest, SetupError
from workers.detokenize import Detokenizer
from workers.tools import HERMES, style_of
from workers.tools_prompt import explain
from workers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

    from scheduler.request import Message, Prompt, TokenIds, ToolCall
    from workers.grammar import Grammars
    from workers.tools import Style
    from workers.weights.checkpoint import Checkpoint

# What a template raises when it is asked for something that it cannot do.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class TextStream(Protocol):
    """The text of one choice, as its tokens come. What it gives, joined, is the whole answer."""

    stopped: bool  # a stop string is complete: no more text comes, the choice ends
    sent: int  # characters given so far, by this stream and by those that it continues

    def push(self, token: int) -> str:
        """The text that may be sent now, perhaps empty."""
        ...

    def finish(self) -> str:
        """What was still held back: the choice has ended."""
        ...


class Tokens(Protocol):
    """Prompts to tokens, and tokens to text, for one model."""

    fingerprint: str  # equal between workers exactly if they turn text into the same tokens
    eos_ids: frozenset[int]
    context_length: int  # tokens of prompt and answer together

    call_style: Style  # how the model writes tool calls

    @property
    def grammars(self) -> Grammars:
        """Structured output in this vocabulary."""
        ...

    def encode(self, prompt: Prompt, created: float) -> TokenIds:
        """The prompt's tokens, at least one; `created` (Unix seconds) is a template's clock.

        Raises BadRequest, naming the field.
        """
        ...

    def stream(
        self,
        stop: tuple[str, ...],
        emitted: Sequence[int] = (),
        sent: int = 0,
        *,
        tools: bool = False,
    ) -> TextStream:
        """A choice's text, ended by any of `stop`. With `tools`, the tokens that mark tool calls
        are text too.

        One that another worker began goes on after the tokens `emitted`, of whose text the client
        has `sent` characters.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for, perhaps a part of a character; empty if for nothing."""
        ...

    def token_text(self, token: int) -> str:
        """The same, readable: U+FFFD for what is no whole character."""
        ...


class Text:
    """The Tokens of a model's own tokenizer and chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None,
        eos_ids: frozenset[int],
        special_tokens: Mapping[str, str],
        context_length: int,
    ) -> None:
        """`special_tokens` are what the template may name: bos_token, eos_token, …

        Raises SetupError if the template or the tokenizer is of a kind that is not supported.
        """
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._template = None if chat_template is None else _compile(chat_template)
        self._special_tokens = dict(special_tokens)
        self._silent = self._vocabulary.special_ids | eos_ids
        style = style_of(chat_template or "")
        self._knows_tools = style is not None
        self.call_style = style or HERMES
        marks = map(tokenizer.token_to_id, self.call_style.marks)
        self._call_marks = frozenset(marks) - eos_ids - {None}
        self.eos_ids = eos_ids
        self.context_length = context_length
        words = [chat_template, sorted(eos_ids), sorted(special_tokens.items())]
        digest = hashlib.sha256(json.dumps(words).encode())
        digest.update(tokenizer.to_str().encode())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Text:
        """The text of an open checkpoint, which may be closed afterwards."""
        return cls(
            checkpoint.tokenizer(),
            chat_template=checkpoint.chat_template,
            eos_ids=checkpoint.eos_ids,
            special_tokens=checkpoint.special_tokens,
            context_length=checkpoint.shape.context_length,
        )

    @cached_property
    def grammars(self) -> Grammars:
        """Structured output in this vocabulary. Made on first use: it takes a moment."""
        from workers.grammar import Grammars  # here: most workers never need its 5 MB

        spelled = [self.token_bytes(token) for token in range(len(self._vocabulary))]
        return Grammars(spelled, self._silent, self.eos_ids, self._ids)

    def encode(self, prompt: Prompt, created: float) -> TokenIds:
        """The prompt's tokens. Special tokens that a user types are taken as such.

        A plain text gets the tokens that the tokenizer puts around any text (such as bos); in a
        chat the template writes them. Raises BadRequest.
        """
        if prompt.ids is not None:
            return self._checked(prompt.ids)
        if prompt.messages is not None:
            rendered = self._render(prompt, prompt.messages, created)
            return self._tokenise(rendered, "messages", add_special_tokens=False)
        return self._tokenise(prompt.text or "", "prompt", add_special_tokens=prompt.special)

    def stream(
        self,
        stop: tuple[str, ...],
        emitted: Sequence[int] = (),
        sent: int = 0,
        *,
        tools: bool = False,
    ) -> Detokenizer:
        """The text of one choice, from its start or from where another worker left it."""
        silent = self._silent - self._call_marks if tools else self._silent
        return Detokenizer(self._vocabulary, silent, stop, emitted, sent)

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for, perhaps a part of a character."""
        return self._vocabulary.token_bytes(token)

    def token_text(self, token: int) -> str:
        """The same as text, U+FFFD for what is no whole character."""
        return self.token_bytes(token).decode(errors="replace")

    def _checked(self, ids: TokenIds) -> TokenIds:
        if not ids:
            raise BadRequest("The prompt has no tokens.", param="prompt")
        size = len(self._vocabulary)
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise BadRequest(f"Token {wrong} is not in 0..{size - 1}.", param="prompt")
        return ids

    def _tokenise(self, text: str, param: str, *, add_special_tokens: bool) -> TokenIds:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"Not valid Unicode: {error.reason}.", param=param) from error
        ids = self._ids(text, add_special_tokens=add_special_tokens)
        if not ids:
            raise BadRequest("The prompt has no tokens.", param=param)
        return ids

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> TokenIds:
        # As a batch: `encode` does not let other threads run, for a second per 500 KB, in which no
        # heartbeat would leave this worker. (And of a token's place in the text nobody asks.)
        encode = self._tokenizer.encode_batch_fast
        ids: TokenIds = encode([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _render(self, prompt: Prompt, messages: tuple[Message, ...], created: float) -> str:
        if self._template is None:
            raise BadRequest(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        if not messages:
            raise BadRequest("There must be at least one message.", param="messages")

        tools = prompt.tools
        if tools and not self._knows_tools:
            messages, tools = explain(messages, tools), None

        def strftime_now(form: str) -> str:
            # UTC: a template must not read the time zone of the worker that happens to render it.
            return datetime.datetime.fromtimestamp(created, datetime.UTC).strftime(form)

        try:
            return self._template.render(
                messages=[_message(message) for message in messages],
                tools=json.loads(tools) if tools else None,
                add_generation_prompt=prompt.generation,
                strftime_now=strftime_now,
                **self._special_tokens,
            )
        except TEMPLATE_ERRORS as error:
            raise BadRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _message(message: Message) -> dict[str, Any]:
    """As templates expect it: what is not there is undefined, and arguments are objects."""
    fields = {
        "role": message.role,
        "content": message.content,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [_call(call) for call in message.tool_calls] or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments  # a model may have been cut in the middle of them
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _compile(source: str) -> jinja2.Template:
    """With the settings and functions that Hugging Face's chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise SetupError(f"the model's chat template is no Jinja: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a model would read."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
