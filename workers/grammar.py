"""Structured output: which tokens a grammar allows next.

Grammars are compiled by llguidance (Earley over a lexer of derivatives), which bounds its own work:
a grammar that is too hard is an error, not a long wait. Compiling takes milliseconds to a second,
so it is done once for each grammar and never on the engine's thread.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import llguidance
import numpy as np

from scheduler.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from scheduler.request import Grammar, TokenIds

Mask: TypeAlias = "npt.NDArray[np.bool_]"  # [V], True where a token may follow

KEPT = 64  # compiled grammars
MOST_BYTES = 256 << 10  # of a grammar's source
# Where JSON may have whitespace: a space, or a line break with indentation. A small model that may
# write any amount of it goes on writing it.
WHITESPACE = r"( ?|\n[ \t]{0,32})"


class Grammars:
    """The grammars of one model's vocabulary."""

    def __init__(
        self,
        spelled: Sequence[bytes],
        silent: frozenset[int],
        eos_ids: frozenset[int],
        encode: Callable[[str], TokenIds],
    ) -> None:
        """Token i is `spelled[i]`, but `silent` ones stand for no text; eos may be among them."""
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(spelled, silent, eos_ids, encode)),
            eos_token=sorted(eos_ids),
        )
        self._compiled = lru_cache(KEPT)(self._compile)

    def compile(self, grammar: Grammar) -> None:
        """Make it ready to `start`. Raises BadRequest, naming the field that it came in."""
        self._compiled(grammar)

    def start(self, grammar: Grammar, emitted: TokenIds) -> Matcher:
        """The state of an answer that has begun with `emitted`."""
        matcher = Matcher(self._compiled(grammar).deep_copy(), grammar.param)
        for token in emitted:
            matcher.take(token)
        return matcher

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if len(grammar.text) > MOST_BYTES:
            raise _refuse(grammar.param, f"is longer than {MOST_BYTES >> 10} KiB")
        try:
            source = _SOURCES[grammar.kind](grammar.text)
        except ValueError as error:
            raise _refuse(grammar.param, f"is not supported: {error}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, source)
        if not matcher.is_error():
            matcher.deep_copy().compute_logit_bias()  # the lexer learns its first states here
        if matcher.is_error():
            raise _refuse(grammar.param, f"is not supported: {matcher.get_error()}")
        return matcher


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, inner: llguidance.LLMatcher, param: str) -> None:
        self._inner = inner
        self._param = param

    @property
    def finished(self) -> bool:
        """The answer is whole and nothing can be added to it."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def allowed(self) -> Mask:
        """What may follow; eos only where the answer may end. At least one token.

        Raises BadRequest if the grammar has become too hard to follow.
        """
        mask: Mask = np.frombuffer(self._inner.compute_logit_bias(), np.uint8) != 0
        if self._inner.is_error():
            raise _refuse(self._param, f"cannot be followed further: {self._inner.get_error()}")
        return mask

    def take(self, token: int) -> None:
        """The answer goes on with a token that was allowed."""
        self._inner.consume_token(token)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self,
        spelled: Sequence[bytes],
        silent: frozenset[int],
        eos_ids: frozenset[int],
        encode: Callable[[str], TokenIds],
    ) -> None:
        self.eos_token_id = min(eos_ids)
        self.special_token_ids = sorted(silent | eos_ids)
        self.tokens = list(spelled)
        for token in self.special_token_ids:
            self.tokens[token] = b"<%d>" % token  # a name, never text
        self._encode = encode

    def __call__(self, text: str) -> TokenIds:
        return self._encode(text)


_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": lambda text: llguidance.LLMatcher.grammar_from_json_schema(
        text, overrides={"whitespace_pattern": WHITESPACE}
    ),
    "regex": llguidance.LLMatcher.grammar_from_regex,
    "lark": llguidance.LLMatcher.grammar_from_lark,
}


def _refuse(param: str, what: str) -> BadRequest:
    return BadRequest(f"{param} {what}", param=param, code="invalid_value")
