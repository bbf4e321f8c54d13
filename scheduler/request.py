"""What is asked of the system: one prompt, how to sample from it, and when to stop.

These structs are the part of a request that every process needs. They travel inside messages, so
they hold plain values only and never change once made.
"""

from __future__ import annotations

from typing import Literal

import msgspec

TokenIds = list[int]


class ToolCall(msgspec.Struct, frozen=True):
    """What a model asked for earlier in a chat."""

    id: str
    name: str
    arguments: str  # JSON


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat message, its content flattened to text."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None  # which call a tool's message answers


class Prompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prompt as the client sent it; exactly one of text, messages and ids is set.

    Once a worker has tokenised it, the ledger replaces it by `ids`, so that a replay never renders
    a template again.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    ids: TokenIds | None = None
    tools: str | None = None  # beside messages: what the model may call, a JSON array
    special: bool = True  # a text gets the tokens that the tokenizer puts around any text
    generation: bool = True  # messages are followed by the beginning of an answer


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `min_p` 0 are off.

    Noise is a function of (seed, prompt index, choice index, position) alone, so a draw does not
    depend on batch mates, on the worker, or on a replay.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # how many alternatives to report beside each token; None: none


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """When a choice ends. `max_tokens` None means as far as the context allows."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Grammar(msgspec.Struct, frozen=True):
    """What every answer must match; `param` is the field of the body that asked for it."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str


class ToolUse(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer may call tools. A forced one is made of nothing else, by its grammar."""

    forced: Literal["", "any", "named"] = ""  # named: the answer is the arguments of `name`
    name: str = ""
    parallel: bool = True


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """Where an attempt stands in a worker's queue: a lower one goes first, by field.

    `left_s`: seconds until its first token is due, when it was sent; None: no limit.
    """

    priority: int = 0
    share: int = 0  # how far its API key is ahead of the others (see scheduler.fairness)
    left_s: float | None = None


FIRST_COME = Turn()


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """One prompt and its choices, as sent to a worker: all that is needed to start or take over.

    A replay carries one choice with the ids it has already `emitted` and the number of characters
    of text already `sent` to the client; a fresh job carries none and may have several choices.
    """

    id: str  # begins with the router's (see router_of)
    epoch: int  # grows with each attempt; a worker's words about an older epoch are ignored
    model: str
    prompt: Prompt
    sampling: Sampling
    limits: Limits
    created: float  # Unix seconds of the request's arrival: the clock that templates read
    prompt_index: int = 0
    choices: tuple[int, ...] = (0,)
    emitted: TokenIds = []
    sent: int = 0
    grammar: Grammar | None = None
    tools: ToolUse | None = None
    embed: bool = False  # the answer is no text but the prompt's last hidden state
    echo: bool = False  # the answer repeats the prompt, with its logprobs if any are asked for
    turn: Turn = FIRST_COME
    whole: bool = False  # its tokens are read at its end only: a worker may tell of several at once

    @property
    def prefill_only(self) -> bool:
        """It ends with its prompt, or with the first token after it."""
        most = self.limits.max_tokens
        return self.embed or (most is not None and most <= 1)


def job_id(router: str, number: int, name: str) -> str:
    """An id that no other job of any router has; clients may repeat the `name` of a request."""
    return f"{router}/{number}/{name}"


def router_of(job: str) -> str:
    """The id of the router whose job this is: a worker serves several, its answers go home."""
    return job.partition("/")[0]
