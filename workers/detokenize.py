"""Tokens to text, one at a time, without ever sending what must be taken back."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.vocabulary import Vocabulary


class Detokenizer:
    """A TextStream over a vocabulary's bytes.

    Text is held back while it may be part of a character or of a stop string. What has been given
    after some tokens depends on these tokens alone, so a stream rebuilt from them goes on exactly
    as the first would have.

        bytes ──► decoder (holds an incomplete character) ──► _held (may begin a stop string) ──►
        _ready (replayed, not sent yet) ──► the caller
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        silent: frozenset[int],
        stop: tuple[str, ...],
        emitted: Sequence[int] = (),
        sent: int = 0,
    ) -> None:
        """`silent` tokens give no text; for the others see workers.text.Tokens.stream."""
        self._vocabulary = vocabulary
        self._silent = silent
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        self.sent = sent
        replayed = "".join(self._advance(token) for token in emitted)
        self._ready = replayed[sent:]

    def push(self, token: int) -> str:
        """The text that may be sent after one more token."""
        return self._give(self._advance(token))

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        text = ""
        if not self.stopped:
            text = self._match(self._decoder.decode(b"", final=True)) + self._held
            self._held = ""
        return self._give(text)

    def _give(self, text: str) -> str:
        text, self._ready = self._ready + text, ""
        self.sent += len(text)
        return text

    def _bytes(self, token: int) -> bytes:
        return b"" if token in self._silent else self._vocabulary.token_bytes(token)

    def _advance(self, token: int) -> str:
        if self.stopped:
            return ""
        return self._match(self._decoder.decode(self._bytes(token)))

    def _match(self, new: str) -> str:
        """What of the held and the new text is certain to be part of the answer.

        The answer ends at the first character with which any stop string is complete; of those
        complete there the longest is cut off. So it does not matter how tokens cut the text.
        """
        if not new:
            return ""
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[1]]
        certain = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
