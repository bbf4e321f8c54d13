"""Which bytes each token of a vocabulary stands for."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The tokens of a tokenizer, each as bytes: their concatenation is the text in UTF-8.

    Byte-level vocabularies and SentencePiece-like ones (with or without byte tokens) are known.
    The space that starts a SentencePiece word is kept, also on the first token: an answer's text
    goes on where the prompt's ended.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises SetupError for a kind of vocabulary that is not known."""
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder  # its state is its part of tokenizer.json
        self._spelling = _spelling(json.loads(decoder.__getstate__()) if decoder else None)
        self._bytes: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)

    def __len__(self) -> int:
        size: int = self._tokenizer.get_vocab_size()
        return size

    def token_bytes(self, token: int) -> bytes:
        """Empty for a number that is no token: models may have more rows than tokens."""
        if token not in self._bytes:
            spelled = self._tokenizer.id_to_token(token)
            self._bytes[token] = b"" if spelled is None else self._spelling(spelled)
        return self._bytes[token]


def _spelling(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """How a token's spelling becomes bytes, from the tokenizer's `decoder`."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    spaces = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
    if len(spaces) != 1 or not {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}.issuperset(
        kinds
    ):
        raise SetupError(
            f"the tokenizer's decoder is {' + '.join(kinds) or 'missing'}; supported are "
            "byte-level and SentencePiece vocabularies"
        )
    before, after = spaces[0]
    has_byte_tokens = "ByteFallback" in kinds

    def sentencepiece(spelled: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(spelled) if has_byte_tokens else None
        return bytes.fromhex(byte[1]) if byte else spelled.replace(before, after).encode()

    return sentencepiece


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    """The character that stands for a space in a token's spelling, and the space."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if "String" not in step["pattern"]:
        raise SetupError(f"the tokenizer's decoder replaces by a pattern: {step['pattern']}")
    return step["pattern"]["String"], step["content"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


def _byte_level(spelled: str) -> bytes:
    # Tokens added by hand are spelled as they are, outside the alphabet too.
    if any(character not in _BYTE_OF for character in spelled):
        return spelled.encode()
    return bytes(_BYTE_OF[character] for character in spelled)
