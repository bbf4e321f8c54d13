"""A tokenizer from a GGUF file's metadata: byte-level BPE, as llama.cpp's key names describe it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`: the members that change how text is cut."""

    CONTROL = 3  # found whole in a prompt, no text in an answer
    USER_DEFINED = 4  # found whole in a prompt, text like any other in an answer


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of vocabularies cuts text before its merges apply."""

    pre_tokenizer: PreTokenizer
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is in the vocabulary is a token whatever the merges
    adds_bos: bool = False  # where the file does not say


def _words(digits: str) -> PreTokenizer:
    """The split of Llama 3 and Qwen 2, which differ only in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), behavior="isolated"), byte_level])


def _families() -> dict[str, Family]:
    """By `tokenizer.ggml.pre`."""
    return {
        "smollm": Family(
            Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        ),
        "llama-bpe": Family(_words(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
        "qwen2": Family(_words(r"\p{N}"), nfc=True),
    }


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises SetupError for a kind of tokenizer that is not built here, and KeyError, TypeError or
    ValueError where the metadata is damaged.
    """
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    families = _families()
    if kind[0] != "gpt2" or kind[1] not in families:
        raise SetupError(
            f"its tokenizer is {kind[0]!r} with pre-tokenizer {kind[1]!r}; of GGUF tokenizers "
            f"only 'gpt2' with {', '.join(sorted(families))} are supported: use the model's "
            "safetensors folder, which carries a tokenizer.json"
        )
    family = families[str(kind[1])]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(_merger(tokens, metadata["tokenizer.ggml.merges"], family))
    if family.nfc:
        tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = family.pre_tokenizer
    tokenizer.decoder = ByteLevelDecoder()
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    if metadata.get("tokenizer.ggml.add_bos_token", family.adds_bos):
        bos = int(metadata["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _merger(tokens: list[str], merges: list[str], family: Family) -> BPE:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a merge of the tokenizer is not a pair")
    try:
        return BPE(
            vocab=vocabulary,
            merges=[(left, right) for left, right in pairs],
            ignore_merges=family.ignore_merges,
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer's merges do not fit its tokens: {error}") from error


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    def of(kind: TokenType) -> list[AddedToken]:
        special = kind is TokenType.CONTROL
        return [
            AddedToken(token, normalized=False, special=special)
            for token, token_type in zip(tokens, types, strict=bool(types))
            if token_type == kind
        ]

    tokenizer.add_special_tokens(of(TokenType.CONTROL))
    tokenizer.add_tokens(of(TokenType.USER_DEFINED))
