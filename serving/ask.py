"""Between the HTTP edge and the gateway: what is asked, what comes back, in the core's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from scheduler.messages import CallDelta, Echo, FinishReason, Tokenised, TokenLogprob
from scheduler.request import Grammar, Limits, Prompt, Sampling, ToolUse
from serving.wish import Wish

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager


class Ask(msgspec.Struct, frozen=True):
    """One HTTP request: `n` choices for each prompt."""

    id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    limits: Limits
    n: int
    created: float  # Unix seconds of arrival
    grammar: Grammar | None = None
    tools: ToolUse | None = None
    echo: bool = False
    embed: bool = False
    whole: bool = False  # nobody reads its deltas before the end
    wish: Wish = Wish()


class Delta(msgspec.Struct, frozen=True, gc=False):
    """A piece of one choice. `index` is prompt index · n + choice index, as OpenAI counts.

    `echo` comes with a choice's first piece, `cached` with that of a prompt's first choice.
    """

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    calls: tuple[CallDelta, ...] = ()
    echo: Echo | None = None
    cached: int = 0  # prompt tokens whose KV was known already
    embedding: bytes = b""  # [D] float32, of an ask that wants no text


class ModelInfo(msgspec.Struct, frozen=True):
    name: str
    context_length: int
    created: float  # Unix seconds since when a worker serves it


class Stream(Protocol):
    """An accepted request."""

    prompt_tokens: int  # over all prompts

    async def pour(self, take: Callable[[Delta], bool]) -> bool:
        """Give `take` each delta, in order within each choice; True: all choices have finished.

        `take` is called where deltas arrive, so it must not wait: it gives False when it has no
        room for more, and so does this then; what comes meanwhile is kept for the next call.
        Raises Unavailable when no worker can go on, and what `take` raises.
        """
        ...


class Generator(Protocol):
    """What the HTTP edge needs of the system behind it."""

    def models(self) -> Sequence[ModelInfo]:
        """The models that at least one worker serves."""
        ...

    @property
    def ready(self) -> bool:
        """Every model that this router was told to serve has the workers it needs."""
        ...

    async def tokenise(self, model: str, prompt: Prompt, created: float) -> Tokenised:
        """The prompt in tokens, and these as text. Raises BadRequest or Unavailable."""
        ...

    def open(self, ask: Ask) -> AbstractAsyncContextManager[Stream]:
        """Enter when every prompt is accepted; leaving cancels what has not finished.

        Entering raises BadRequest (404 unknown model, 400 too long, ...) or Unavailable.
        """
        ...
